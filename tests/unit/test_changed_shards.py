"""Data files that change while a run reads them: the run ends.

No changed byte is served before that if every read is compared, as in a training that reads once per second. If reads
follow each other faster, batches of a short time may hold changed data, and the error says of which time.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
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
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading import batch_maker
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.reading.unchanged import comparison_pace, file_comparison, shard_guard
from mixtera_hpc.dataplane.reading.unchanged.comparison_pace import MAX_PAUSE_S, ComparisonPace
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers
from tests.unit.file_times import make_old, wait_for_new_time

Row = dict[str, Any]
NUM_ROWS = 30
STEPS = 40
"""More than an epoch."""
FORMATS: dict[str, tuple[Callable[[Path, Sequence[Row]], list[Path]], list[str]]] = {
    "jsonl": (writers.write_jsonl, []),
    "json": (writers.write_json, ["data.format=json"]),
    **{ending: (partial(writers.write_compressed, ending=ending, frame_rows=5), []) for ending in ("gz", "bz2", "xz")},
    "zst": (partial(writers.write_compressed, ending="zst", frame_rows=5), []),
    "parquet": (partial(writers.write_parquet, group_rows=5), []),
    "arrow": (partial(writers.write_arrow, batch_rows=5), []),
    "arrow, compressed": (partial(writers.write_arrow, batch_rows=5, compression="zstd"), []),
    "arrow stream": (partial(writers.write_arrow_stream, batch_rows=5), []),
    "tar": (writers.write_tar, ["data.text=txt"]),
    "mds": (writers.write_mds_rows, []),
    "mds.zstd": (partial(writers.write_mds_rows, compression="zstd"), []),
    "megatron": (
        writers.write_tokens,
        ["dataplane.vocab_size=256", "mixture.unit=tokens", "dataplane.seq_len=15", "dataplane.add_eos=false"],
    ),
    "megatron, samples": (writers.write_tokens, ["dataplane.vocab_size=256"]),
    "text": (writers.write_text, ["data.include=['*.txt']", "data.format=text"]),
}


def rows(letter: str) -> list[Row]:
    """Return rows with texts of one letter, whose lengths do not depend on it."""
    return [{"text": letter * (20 + number), "meta": {"number": number}} for number in range(NUM_ROWS)]


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read few steps at a time: what was read before a change may be served."""
    monkeypatch.setattr(batch_maker, "SAMPLE_BYTES_PER_READ", 200)
    monkeypatch.setattr(batch_maker, "STORED_TOKENS_PER_READ", 64)
    # As if a read took longer than the pause after a comparison.
    monkeypatch.setattr(comparison_pace, "PAUSE_PER_DURATION", 0)


def written(kind: str, folder: Path, letter: str = "a") -> list[Path]:
    folder.mkdir()
    paths = FORMATS[kind][0](folder, rows(letter))
    make_old(*paths)
    return paths


def configured(kind: str, data: Path) -> Config:
    """Build the index of a folder of one format."""
    words = [f"data.root={data}", f"index.path={data.parent / 'i.h5'}", "index.block_rows=4", "dataplane.workers=0"]
    words += ["dataplane.global_batch_size=2", "dataplane.prefetch_batches=1", "dataplane.chunk_steps=4"]
    if "mixture.unit=tokens" not in FORMATS[kind][1]:
        words.append("mixture.unit=samples")
    config = compose([*words, *FORMATS[kind][1]])
    build_index(config)
    return config


def served(config: Config, after_steps: int = STEPS, change: Callable[[], object] = lambda: None) -> list[Any]:
    """Return the content of every batch; `change` is called after some steps."""
    contents: list[Any] = []
    with DataPlane.open(config, Local()) as plane:
        try:
            for batch in plane:
                contents.append(batch.tokens.copy() if batch.payloads is None else repr(batch.payloads))
                if len(contents) == after_steps:
                    change()
                if len(contents) == STEPS:
                    break
        except DataError as error:
            contents.append(error)
    return contents


def equal(first: Any, second: Any) -> bool:
    return bool(np.array_equal(first, second))


def in_place(source: Path, target: Path) -> None:
    """Write other bytes into a file that stays the same."""
    with target.open("r+b") as file:
        file.write(source.read_bytes())
        file.truncate(source.stat().st_size)


def by_rename(source: Path, target: Path) -> None:
    """Put another file in place of one, as a copy or a download does."""
    shutil.copy(source, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


@pytest.mark.parametrize(
    ("kind", "replace"),
    [
        *((kind, in_place) for kind in FORMATS),
        ("jsonl", by_rename),
        *(pytest.param(kind, by_rename, marks=pytest.mark.full) for kind in FORMATS if kind != "jsonl"),
    ],
)
def test_a_replaced_shard_ends_the_run_before_a_changed_byte_is_served(
    kind: str, replace: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    shards = written(kind, tmp_path / "data")
    others = written(kind, tmp_path / "others", "b")
    config = configured(kind, tmp_path / "data")
    before = served(config)
    assert len(before) == STEPS

    def change() -> None:
        for other, shard in zip(others, shards, strict=True):
            replace(other, shard)

    changed = served(config, 3, change)
    *batches, error = changed
    assert isinstance(error, DataError), "the run goes on"
    assert error.exit_code == 2
    assert any(f"{shard} has changed while the run reads it" in str(error) for shard in shards)
    assert len(batches) >= 3
    assert all(map(equal, batches, before)), "changed bytes were served"


@pytest.mark.parametrize("kind", ["jsonl", "zst", "parquet", "megatron"])
def test_a_shard_with_a_new_time_and_the_same_content_is_read_on(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = written(kind, tmp_path / "data")
    config = configured(kind, tmp_path / "data")
    before = served(config)
    assert all(map(equal, served(config, 3, lambda: os.utime(shard)), before))
    assert caplog.text.count("another modification time than in the index") == 1


def test_many_touched_shards_write_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shard,) = written("jsonl", tmp_path / "data")
    more = shard.with_name(f"more-{shard.name}")
    shutil.copy(shard, more)
    config = configured("jsonl", tmp_path / "data")

    def touch() -> None:
        os.utime(shard)
        os.utime(more)

    assert not isinstance(served(config, 3, touch)[-1], DataError)
    assert caplog.text.count("another modification time than in the index") == 1


@pytest.mark.parametrize("kind", ["megatron", "megatron, samples", "arrow"])
def test_a_mapped_file_that_was_truncated_before_a_late_read_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access to its pages would end the process."""
    monkeypatch.setattr(comparison_pace, "LATE_S", 0)
    (shard,) = (path for path in written(kind, tmp_path / "data") if path.suffix in (".bin", ".arrow"))
    config = configured(kind, tmp_path / "data")
    # No decoded row stays in memory.
    config = replace(config, data=replace(config.data, cache_bytes=1))
    with closing(BatchMaker(open_source(config, Local()), BatchSlice(), audit=False)) as maker:
        plan = maker._source.planner.plan(PlannerState.start(1), maker._source.weights)[0]
        assert list(maker.batches(plan, 0))
        os.truncate(shard, 0)
        with pytest.raises(DataError, match="has changed while the run reads it: it has 0 bytes") as error:
            list(maker.batches(plan, 0))
    assert error.value.__notes__ == ["No batch with changed data was served."]


@pytest.mark.parametrize("change", ["truncated", "replaced"])
def test_a_token_file_that_changes_between_the_batches_of_a_read_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_pace, "LATE_S", 0)
    monkeypatch.setattr(batch_maker, "STORED_TOKENS_PER_READ", 1 << 20)
    # One step; the four steps of the chunk are read together.
    monkeypatch.setattr(batch_maker, "TOKENS_PER_WRITE", 1)
    (shard,) = (path for path in written("megatron", tmp_path / "data") if path.suffix == ".bin")
    (other,) = (path for path in written("megatron", tmp_path / "others", "b") if path.suffix == ".bin")
    config = configured("megatron", tmp_path / "data")
    with closing(BatchMaker(open_source(config, Local()), BatchSlice(), audit=False)) as maker:
        plan = maker._source.planner.plan(PlannerState.start(1), maker._source.weights)[0]
        batches = maker.batches(plan, 0)
        assert [next(batches).step, next(batches).step] == [0, 1]
        if change == "truncated":
            os.truncate(shard, 0)
        else:
            in_place(other, shard)
        with pytest.raises(DataError, match="has changed while the run reads it") as error:
            next(batches)
    assert error.value.__notes__ == ["No batch with changed data was served."]


@pytest.fixture
def _slow_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a clock pass one second at every look: a comparison takes a second, and each check that does not compare."""
    monkeypatch.setattr(comparison_pace, "PAUSE_PER_DURATION", MAX_PAUSE_S)
    monkeypatch.setattr(comparison_pace, "LATE_S", 1000.0)
    pace = partial(ComparisonPace, clock=partial(next, itertools.count(1.0)))
    monkeypatch.setattr(file_comparison, "ComparisonPace", pace)


@pytest.mark.usefixtures("_slow_comparisons")
def test_between_fast_reads_a_change_ends_the_run_later_and_the_error_says_how_much_later(tmp_path: Path) -> None:
    (shard,) = written("jsonl", tmp_path / "data")
    (other,) = written("jsonl", tmp_path / "others", "b")
    config = configured("jsonl", tmp_path / "data")
    source = open_source(replace(config, dataplane=replace(config.dataplane, chunk_steps=STEPS)), Local())
    plan = source.planner.plan(PlannerState.start(1), source.weights)[0]

    def read(maker: BatchMaker, steps: range) -> list[Any]:
        """Read step by step in this thread, so that every look at the clock is in the same order."""
        return [repr(batch.payloads) for step in steps for batch in maker.batches_of(plan, range(step, step + 1))]

    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        before = read(maker, range(STEPS))
    batches: list[Any] = []
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        read(maker, range(5))
        in_place(other, shard)
        with pytest.raises(DataError, match=f"{shard} has changed while the run reads it") as raised:
            for step in range(5, STEPS):
                batches += read(maker, range(step, step + 1))
    error = raised.value
    is_changed = [not equal(*pair) for pair in zip(batches, before[5:], strict=False)]
    (note,) = error.__notes__
    assert any(is_changed), "no check was skipped, so this tests nothing"
    assert re.fullmatch(r"Batches that were served during the last \d+ s may hold changed data\.", note)
    assert sum(is_changed) <= MAX_PAUSE_S + 1


@pytest.mark.usefixtures("_slow_comparisons")
@pytest.mark.parametrize("where", ["the last chunk", "a read that fails"])
def test_fast_reads_are_compared_in(where: str, tmp_path: Path) -> None:
    """A comparison is not left to the next read if there is none, or if it explains an error."""
    (shard,) = written("jsonl", tmp_path / "data")
    (other,) = written("jsonl", tmp_path / "others", "b")
    config = configured("jsonl", tmp_path / "data")
    if where == "the last chunk":
        dataplane = replace(config.dataplane, chunk_steps=20)
        config = replace(config, dataplane=dataplane, training=replace(config.training, num_steps=30))
        before = served(config)
        *batches, error = served(config, 20, partial(in_place, other, shard))
        assert all(map(equal, batches, before)), "changed bytes were served"
    else:
        *batches, error = served(config, 3, partial(os.truncate, shard, 100))
    assert isinstance(error, DataError)
    assert f"{shard} has changed while the run reads it" in str(error)


@pytest.mark.usefixtures("_slow_comparisons")
def test_a_reader_without_a_step_of_the_last_chunk_compares_what_it_has_read(tmp_path: Path) -> None:
    (shard,) = written("jsonl", tmp_path / "data")
    (other,) = written("jsonl", tmp_path / "others", "b")
    config = configured("jsonl", tmp_path / "data")
    source = open_source(config, Local())
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        plan = source.planner.plan(PlannerState.start(1), source.weights)[0]
        assert list(maker.batches(plan, 0))
        in_place(other, shard)
        assert list(maker.batches_of(plan, range(1)))
        with pytest.raises(DataError, match="has changed while the run reads it"):
            list(maker.batches_of(replace(plan, last=True), range(0)))


def test_a_restored_modification_time_hides_no_change(tmp_path: Path) -> None:
    """A run compares the change time as well, which no program can set."""
    (shard,) = written("jsonl", tmp_path / "data")
    config = configured("jsonl", tmp_path / "data")
    times = shard.stat()

    def change() -> None:
        content = shard.read_bytes().replace(b"a", b"b")
        wait_for_new_time(shard)
        # One write: a shorter file would be noticed by its size.
        with shard.open("r+b", buffering=0) as file:
            file.write(content)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert "first or last MiB differs" in str(served(config, 3, change)[-1])


def test_a_removed_shard_ends_the_run(tmp_path: Path) -> None:
    (shard,) = written("jsonl", tmp_path / "data")
    config = configured("jsonl", tmp_path / "data")
    assert "it cannot be found: No such file" in str(served(config, 3, shard.unlink)[-1])


def test_a_read_looks_up_each_of_its_shards_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a thousand ranks each file access counts: no more look-ups than reads, and no fingerprint of an old file."""
    written("text", tmp_path / "data")
    config = configured("text", tmp_path / "data")
    looked_up: list[str] = []
    real_stat = os.stat

    def counted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        looked_up.append(str(path))
        return real_stat(path, *arguments, **options)

    with DataPlane.open(config, Local()) as plane:
        monkeypatch.setattr(shard_guard.os, "stat", counted)
        monkeypatch.setattr(shard_guard, "fingerprint_of_shard", None)
        rows_read = sum(len(batch.positions) for batch, _ in zip(plane, range(STEPS), strict=False))
    of_shards = [path for path in looked_up if path.startswith(str(tmp_path / "data"))]
    # One row of each shard; a few batches are read ahead.
    assert NUM_ROWS <= len(of_shards) <= rows_read + 20


def test_a_run_ends_with_exit_code_2_and_names_the_shard(collection: list[str], tmp_path: Path) -> None:
    """The reading processes of a run notice the change; the launcher reports it without a traceback."""
    pytest.importorskip("torch")
    source = Path(collection[0].removeprefix("data.root="))
    shutil.copytree(source, tmp_path / "data")
    words = [f"data.root={tmp_path / 'data'}", *collection[1:], f"index.path={tmp_path / 'i.h5'}"]
    build_index(compose(words))
    # Two processes, which share their look-ups.
    words += ["dataplane.workers=2", "dataplane.seq_len=32", "dataplane.global_batch_size=4"]
    words += ["training.num_steps=100000", "dataplane.chunk_steps=2", f"run.root={tmp_path / 'runs'}", "run.id=mine"]
    command = [sys.executable, "-m", "mixtera_hpc", "run", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not re.search(r"step +\d", (tmp_path / "log").read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        shard = tmp_path / "data/a.jsonl"
        shard.write_bytes(shard.read_bytes().swapcase())
        process.wait(timeout=600)
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "log").read_text()
    assert process.returncode == 2, text
    assert f"{shard} has changed while the run reads it" in text
    assert "Traceback" not in text
