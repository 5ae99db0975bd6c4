"""Rows of plain files as views of mapped memory: the same rows as by positioned reads, and bounded memory and reads."""

import errno
import json
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading import batch_maker
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.residency.open_shards import max_open_shards
from mixtera_hpc.dataplane.reading.rows import mapped_rows
from mixtera_hpc.dataplane.reading.rows.mapped_rows import MappedPlaces, MappedRows
from mixtera_hpc.dataplane.reading.rows.row_files import RowFiles
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.reading.stored import mapped_files
from mixtera_hpc.dataplane.reading.unchanged import comparison_pace
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers
from mixtera_hpc.tokens.bpe_training import train_bpe
from tests.unit.file_times import wait_for_new_time

NUM_ROWS = 300
BLOCK_ROWS = 16
BATCH = 8
DESCRIPTORS = 256
WORDS = ["mixture.unit=samples", f"dataplane.global_batch_size={BATCH}", "dataplane.chunk_steps=8"]
ENDS = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=2"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [row(number) for number in range(20)]
    return train_bpe(texts, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def row(number: int, size: int = 0) -> str:
    """Return a row of about 200 bytes, or of `size` bytes."""
    text = f"{number:06} ä"
    value = {"text": text + "z" * (100 + number % 90), "meta": {"third": number % 3, "tenth": number % 10}}
    line = json.dumps(value, ensure_ascii=False)
    return line if not size else line.replace("z", "z" * (1 + size - len(line.encode())), 1)


def write_lines(folder: Path) -> None:
    """Write lines as editors and programs on other systems leave them."""
    lines = [row(number) for number in range(NUM_ROWS)]
    (folder / "plain.jsonl").write_text("\n".join(lines[:60]))
    (folder / "windows.jsonl").write_text("\r\n".join(lines[60:120]) + "\r\n")
    (folder / "mark.jsonl").write_text("\ufeff" + "\n".join(lines[120:180]) + "\n")
    (folder / "empty.jsonl").touch()
    # Rows that begin and end at the borders of pages.
    pages = [row(number, mmap.PAGESIZE - 1) for number in range(180, 240)]
    (folder / "pages.jsonl").write_text("\n".join(pages) + "\n")
    (folder / "rest.jsonl").write_text("\n".join(lines[240:]) + "\n")


def write_array(folder: Path) -> None:
    writers.write_json(folder, [json.loads(row(number)) for number in range(NUM_ROWS)])


def built(folder: Path, *words: str) -> Config:
    config = compose([f"data.root={folder}", f"index.path={folder / 'i.h5'}", f"index.block_rows={BLOCK_ROWS}", *words])
    build_index(config)
    return config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_lines(tmp_path)
    return built(tmp_path, *WORDS, *ENDS)


def mapped_of(maker: BatchMaker) -> MappedRows:
    mapped = maker._reader._rows._mapped
    assert mapped is not None
    return mapped


def served(
    config: Config, batch_slice: BatchSlice | None = None, after: Callable[[BatchMaker], object] = lambda maker: None
) -> tuple[list[str], int]:
    """Return the content of all batches, and the number of blocks that were loaded as a whole."""
    source = open_source(config, Local())
    maker = BatchMaker(source, batch_slice or BatchSlice(), audit=False)
    contents: list[str] = []
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            contents.append(repr(batch.payloads) if batch.payloads is not None else batch.tokens.tobytes().hex())
            after(maker)
        if plan.last:
            num_loads = mapped_of(maker).num_loads
            maker.close()
            return contents, num_loads


def positioned(config: Config, batch_slice: BatchSlice | None = None) -> list[str]:
    """Return the content of all batches if nothing is mapped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_rows, "MIN_DENSITY", np.inf)
        patch.setattr(mapped_rows, "SMALL_BLOCK_BYTES", 0)
        contents, num_loads = served(config, batch_slice)
    assert num_loads == 0
    return contents


@pytest.mark.parametrize("write", [write_lines, write_array])
@pytest.mark.parametrize("shuffle", ["window", "sequence", "none"])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_rows_are_those_of_positioned_reads(
    write: Callable[[Path], None], shuffle: str, unit: str, tmp_path: Path, vocabulary: Path
) -> None:
    write(tmp_path)
    words = [*WORDS, f"mixture.unit={unit}", f"dataplane.shuffle={shuffle}", "dataplane.window_bytes=20000"]
    if unit == "tokens":
        words += [f"dataplane.tokenizer={vocabulary}", "dataplane.seq_len=64"]
    if write is write_array:
        words.append("data.format=json")
    config = built(tmp_path, *words, *ENDS)
    contents, num_loads = served(config)
    assert num_loads > NUM_ROWS / BLOCK_ROWS / 2
    assert contents == positioned(config)


@pytest.fixture
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_maker, "SAMPLE_BYTES_PER_READ", 200)


@pytest.mark.usefixtures("_small_reads")
def test_blocks_are_loaded_in_bounded_memory_as_long_as_it_pays(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of the data are one window, of which a third fits into the budget."""
    config = replace(config, data=replace(config.data, cache_bytes=180_000))
    budget = 90_000
    released: list[int] = []
    loaded: list[int] = []
    served_bytes: list[int] = []
    monkeypatch.setattr(mapped_rows, "release_pages", lambda address, num_bytes: released.append(num_bytes))

    def record_size(address: int, num_bytes: int) -> bool:
        loaded.append(num_bytes)
        return True

    monkeypatch.setattr(mapped_rows, "load_pages", record_size)
    find = MappedRows.find

    def record_bytes(self: MappedRows, *arguments: Any) -> MappedPlaces:
        found = find(self, *arguments)
        served_bytes.append(int((found.stop - found.first).sum()))
        return found

    def record(maker: BatchMaker) -> None:
        mapped = mapped_of(maker)
        assert mapped.num_bytes == int(mapped._blocks.length[mapped._is_loaded].sum())
        assert mapped.num_bytes == sum(loaded) - sum(released)
        assert 0 < mapped.num_bytes <= budget

    monkeypatch.setattr(MappedRows, "find", record_bytes)
    contents, _ = served(config, after=record)
    monkeypatch.setattr(MappedRows, "find", find)
    assert contents == positioned(config)
    assert released
    assert 0 < sum(loaded) <= budget + sum(served_bytes) / mapped_rows.MIN_DENSITY


@pytest.mark.usefixtures("_small_reads")
def test_blocks_are_loaded_again_after_all_pages_were_released(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """An access to a page that was released would wait for the file system with the interpreter's lock."""
    _, num_loads = served(config)
    monkeypatch.setattr(mapped_files, "MAX_RESIDENT_BYTES", 0)
    monkeypatch.setattr(mapped_files, "RELEASE_EVERY_S", 0)
    released: list[int] = []
    monkeypatch.setattr(mapped_files, "release_pages", lambda address, num_bytes: released.append(address))
    contents, num_loads_after_releases = served(config)
    assert released
    assert num_loads_after_releases > 2 * num_loads
    assert contents == positioned(config)


def test_released_blocks_leave_the_memory_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    with path.open("rb") as file:
        content = mapped_rows.map_array(path, np.dtype(np.uint8))
        assert file.fileno() >= 0

    def resident() -> int:
        _, _, entry = Path("/proc/self/smaps").read_text().partition(f" {path}\n")
        return int(entry.split("Rss:")[1].split()[0]) << 10

    assert resident() == 0
    mapped_rows.load_pages(content.ctypes.data, content.nbytes)
    assert resident() == content.nbytes
    mapped_rows.release_pages(content.ctypes.data + 5, content.nbytes // 2 - 5)
    assert resident() == content.nbytes // 2


@pytest.mark.parametrize(
    ("words", "num_groups", "is_loaded"),
    [
        (["query.where=tenth == 3"], 1, False),
        (["query.where=third == 0"], 1, True),
        (["dataplane.lanes=1"], BATCH, False),
        (["dataplane.lanes=2"], BATCH, True),
    ],
)
def test_blocks_of_which_few_rows_are_served_are_not_loaded(
    words: list[str], num_groups: int, is_loaded: bool, tmp_path: Path
) -> None:
    write_lines(tmp_path)
    properties = ["data.properties.third=meta.third", "data.properties.tenth=meta.tenth"]
    config = built(tmp_path, *WORDS, *ENDS, *properties, *words)
    own = BatchSlice(group=1 if num_groups > 1 else 0, num_groups=num_groups)
    contents, num_loads = served(config, own)
    assert bool(num_loads) == is_loaded
    assert contents == positioned(config, own)


@pytest.mark.parametrize(("row_bytes", "is_loaded"), [(15_000, True), (17_000, False)])
def test_blocks_of_large_rows_are_not_loaded(row_bytes: int, is_loaded: bool, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(row(number, row_bytes) for number in range(64)))
    config = built(tmp_path, *WORDS, *ENDS)
    contents, num_loads = served(config)
    assert bool(num_loads) == is_loaded
    assert contents == positioned(config)


def test_where_pages_cannot_be_loaded_blocks_are_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.14 does not know the call."""
    monkeypatch.setattr(mapped_rows, "load_pages", lambda address, num_bytes: False)
    num_reads = 0
    read_bytes = RowFiles.read_bytes

    def counted(files: RowFiles, shard: int, offset: int, size: int) -> bytes:
        nonlocal num_reads
        num_reads += 1
        return read_bytes(files, shard, offset, size)

    monkeypatch.setattr(RowFiles, "read_bytes", counted)
    contents, num_loads = served(config)
    assert num_loads == num_reads > 0
    assert contents == positioned(config)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOMEM])
def test_where_files_cannot_be_mapped_rows_are_read(
    code: int, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, dtype: np.dtype[np.uint8]) -> None:
        raise DataError(f"{path} cannot be read: {os.strerror(code)}.")

    monkeypatch.setattr(mapped_rows, "map_array", fail)
    contents, num_loads = served(config)
    assert num_loads == 0
    assert contents == positioned(config)
    assert caplog.text.count("Rows are not read from mapped files") == 1


@pytest.mark.parametrize("window_bytes", [2000, 100_000], ids=["few shards per read", "all shards in each read"])
@pytest.mark.usefixtures("_small_reads")
def test_more_shards_than_can_be_mapped_take_turns(
    window_bytes: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_rows, "MAX_SHARDS", 3)
    config = replace(config, dataplane=replace(config.dataplane, window_bytes=window_bytes, lanes=1))
    numbers: list[int] = []
    contents, num_loads = served(config, after=lambda maker: numbers.append(len(mapped_of(maker)._files._files)))
    assert num_loads
    assert max(numbers) == 3
    assert contents == positioned(config)


@pytest.fixture
def _few_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("_few_descriptors", "_small_reads")
@pytest.mark.parametrize(("cache_bytes", "loads_per_block"), [(1 << 30, 1), (60_000, 2)])
def test_with_more_shards_than_may_be_open_small_blocks_are_loaded_for_one_row(
    cache_bytes: int, loads_per_block: int, tmp_path: Path
) -> None:
    """Load blocks again and again where the budget is too small: about once in each of the two epochs."""
    num_shards = 80
    assert num_shards > max_open_shards()
    for number in range(num_shards):
        rows = [row(n) for n in range(number * 12, number * 12 + 12)]
        (tmp_path / f"{number:03}.jsonl").write_text("\n".join(rows))
    words = ["data.properties.tenth=meta.tenth", "query.where=tenth == 3", "index.block_rows=12"]
    config = built(tmp_path, *WORDS, *ENDS, *words, f"data.cache_bytes={cache_bytes}")
    contents, num_loads = served(config)
    assert num_loads == pytest.approx(loads_per_block * num_shards, rel=0.2)
    assert contents == positioned(config)


def test_a_block_is_named_while_it_is_loaded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that hangs is reported with the shard that it hangs in."""
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    places: list[tuple[int, int, int]] = []

    def record(address: int, num_bytes: int) -> bool:
        place = maker._reader.place.now()
        assert place.stage_name == "read"
        places.append((place.shard, place.first_row, place.last_row))
        return True

    monkeypatch.setattr(mapped_rows, "load_pages", record)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    next(maker.batches(plan, 0))
    blocks = source.blocks
    last_row = blocks.first_row + blocks.rows - 1
    assert places
    assert set(places) <= set(zip(blocks.shard.tolist(), blocks.first_row.tolist(), last_row.tolist(), strict=True))
    maker.close()


def test_samples_outlive_the_reader(config: Config) -> None:
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    batches = maker.batches(plan, 0)
    first = next(batches)
    maker.close()
    following = next(batches)
    assert first.payloads != following.payloads
    assert all(payload["text"] for payload in following.payloads or [])


def read_until_error(config: Config, num_batches: int, change: Callable[[], object]) -> str:
    """Return the error after a change of files."""
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    state = PlannerState.start(source.num_domains)
    count = 0
    try:
        while True:
            plan, state = source.planner.plan(state, source.weights)
            for _ in maker.batches(plan, 0):
                count += 1
                if count == num_batches:
                    change()
            assert not plan.last
    except DataError as error:
        return str(error)
    finally:
        maker.close()


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_file_that_was_cut_off_long_after_a_read_is_named_before_its_pages_are_touched(
    unit: str, tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access to a page behind the end of a file would kill the process."""
    monkeypatch.setattr(comparison_pace, "LATE_S", 0)
    monkeypatch.setattr(comparison_pace, "PAUSE_PER_DURATION", 0)
    (tmp_path / "a.jsonl").write_text("\n".join(row(number, mmap.PAGESIZE) for number in range(NUM_ROWS)))
    words = [*WORDS, f"mixture.unit={unit}", "dataplane.chunk_steps=1"]
    if unit == "tokens":
        words += [f"dataplane.tokenizer={vocabulary}", "dataplane.seq_len=64"]
    config = built(tmp_path, *words, *ENDS)
    shard = tmp_path / "a.jsonl"
    error = read_until_error(config, 4, partial(os.truncate, shard, 0))
    assert f"{shard} has changed while the run reads it: it has 0 bytes" in error


def test_rows_that_change_between_their_read_and_their_decoding_are_not_served(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_pace, "PAUSE_PER_DURATION", 0)
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    batches = maker.batches(plan, 0)
    next(batches)
    assert mapped_of(maker).num_loads
    for shard in Path(source.index.data_root).glob("*.jsonl"):
        content = shard.read_bytes().replace(b"z", b"y")
        wait_for_new_time(shard)
        with shard.open("r+b") as file:
            file.write(content)
    with pytest.raises(DataError, match="has changed while the run reads it"):
        next(batches)
    maker.close()


def test_nothing_is_loaded_behind_the_end_of_a_file_that_is_shorter_than_indexed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(config, Local())
    for shard in Path(source.index.data_root).glob("*.jsonl"):
        os.truncate(shard, shard.stat().st_size // 2)
    maker = BatchMaker(source, BatchSlice(), audit=False)
    stops: list[int] = []

    def record_stop(address: int, num_bytes: int) -> bool:
        stops.append(address + num_bytes)
        return True

    monkeypatch.setattr(mapped_rows, "load_pages", record_stop)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    with pytest.raises(DataError, match="has changed while the run reads it"):
        next(maker.batches(plan, 0))
    files = mapped_of(maker)._files
    numbers = np.flatnonzero(files.is_mapped(np.arange(len(source.index.shard_paths))))
    first = files.addresses(numbers)
    last = first + files.num_bytes(numbers)
    assert stops
    assert all(((first < stop) & (stop <= last)).any() for stop in stops)
    maker.close()


def test_pages_behind_the_end_of_a_file_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    content = mapped_rows.map_array(path, np.dtype(np.uint8))
    os.truncate(path, mmap.PAGESIZE)
    mapped_rows.load_pages(content.ctypes.data, mmap.PAGESIZE)
    with pytest.raises(OSError, match="Bad address") as info:
        mapped_rows.load_pages(content.ctypes.data, content.nbytes)
    assert info.value.errno == errno.EFAULT


@pytest.mark.parametrize("column", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_a_wrong_index_reads_nothing_outside_of_the_block(column: str, value: int, config: Config) -> None:
    """The memory between the mapped files belongs to nobody: an access would kill the process."""
    source = open_source(config, Local())
    streams = source.streams()
    reader = DocumentReader(source, streams)
    documents = streams.documents(0, 0, 50)
    documents = documents.select(np.argsort(documents.block, kind="stable"))
    values = getattr(documents, column).copy()
    values[7] = value
    documents.__dict__[column] = values
    mapped = reader._rows._mapped
    assert mapped is not None
    places = mapped.find(documents, source.blocks.shard[documents.block], ReadPlace())
    assert places.chosen.tolist() == [number for number in range(50) if number != 7]
    if value > 0:
        with pytest.raises(DataError):
            reader.samples(documents).take(50)
    reader.close()
