"""Blocks of token files are loaded from the file system before documents are copied from them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.stored import block_loads
from mixtera_hpc.dataplane.reading.stored.block_loads import REPEAT_AFTER_S, BlockLoads
from mixtera_hpc.dataplane.reading.stored.document_places import Places
from mixtera_hpc.dataplane.reading.stored.mapped_files import MappedFiles, map_array
from mixtera_hpc.dataplane.reading.unchanged import comparison_pace
from mixtera_hpc.dataplane.reading.unchanged.comparison_pace import ComparisonPace
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.readers.megatron import MegatronFormat
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron

BLOCK_ROWS = 4


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Two shards of 30 documents each."""
    (tmp_path / "data").mkdir()
    random = np.random.Generator(np.random.Philox(3))
    for name in "ab":
        documents = [random.integers(1, 99, int(random.integers(1, 60))).tolist() for _ in range(30)]
        write_megatron(tmp_path / f"data/{name}.bin", documents, "<u2")
    config = compose(
        [
            f"data.root={tmp_path / 'data'}",
            f"index.path={tmp_path / 'i.h5'}",
            f"index.block_rows={BLOCK_ROWS}",
            "dataplane.vocab_size=100",
            "dataplane.add_eos=false",
            "dataplane.seq_len=16",
        ]
    )
    build_index(config)
    return open_source(config, Local())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Address and size of every load."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(block_loads, "load_pages", lambda *place: ranges.append(place))
    yield ranges


def some_documents(source: Source) -> Documents:
    return source.streams().documents(0, 100, 400)


def places_of(source: Source, documents: Documents) -> Places:
    start = (source.blocks.offset[documents.block] + documents.offset) // 2
    return Places(source.blocks.shard[documents.block].astype(np.int32), start, None)


def files_of(source: Source) -> MappedFiles:
    paths = [Path(source.index.data_root) / name for name in source.index.shard_paths]
    files = MappedFiles(len(paths), lambda number: map_array(paths[number], np.dtype("<u2")))
    files.map(np.arange(len(paths)))
    return files


def test_the_blocks_of_a_read_are_loaded_once_for_a_while(source: Source, loaded: list[tuple[int, int]]) -> None:
    documents = some_documents(source)
    files = files_of(source)
    now_s = 50.0
    is_in_shard = np.ones(len(source.blocks), np.bool_)
    loads = BlockLoads(source, is_in_shard, files, clock=lambda: now_s)
    loads.load(documents, places_of(source, documents))
    blocks = np.unique(documents.block)
    addresses = files.addresses(source.blocks.shard[blocks]) + source.blocks.offset[blocks]
    assert loaded == list(zip(addresses.tolist(), source.blocks.length[blocks].tolist(), strict=True))
    loads.load(documents, places_of(source, documents))
    assert len(loaded) == len(blocks) < len(documents.block)
    now_s += REPEAT_AFTER_S
    loads.load(documents, places_of(source, documents))
    assert len(loaded) == 2 * len(blocks)


def test_of_large_blocks_only_the_wanted_tokens_are_loaded(
    source: Source, loaded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_loads, "MAX_BLOCK_BYTES", 0)
    documents = some_documents(source)
    files = files_of(source)
    loads = BlockLoads(source, np.ones(len(source.blocks), np.bool_), files)
    block = documents.block
    addresses = files.addresses(source.blocks.shard[block]) + source.blocks.offset[block] + documents.offset
    addresses += 2 * documents.first
    for repeated in (1, 2):
        loads.load(documents, places_of(source, documents))
        assert loaded == repeated * list(zip(addresses.tolist(), (2 * documents.wanted).tolist(), strict=True))


def test_blocks_in_stores_are_not_loaded(source: Source, loaded: list[tuple[int, int]]) -> None:
    documents = some_documents(source)
    loads = BlockLoads(source, np.zeros(len(source.blocks), np.bool_), files_of(source))
    loads.load(documents, places_of(source, documents))
    assert not loaded


def test_a_reader_loads_what_it_copies(source: Source, loaded: list[tuple[int, int]]) -> None:
    documents = some_documents(source)
    with contextlib.closing(DocumentReader(source)) as reader:
        reader.prepare(documents, [int(documents.wanted.sum())])
    assert len(loaded) == len(np.unique(documents.block))


@pytest.mark.parametrize("limit", ["MAX_BLOCK_BYTES", "MAX_RESIDENT_BYTES"])
def test_only_the_wanted_tokens_are_loaded_also_if_documents_are_copied_together(
    limit: str, source: Source, loaded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large blocks, and much data in the order of sequences, are not loaded as a whole."""
    monkeypatch.setattr(block_loads, limit, 0)
    plane = replace(source.config.dataplane, shuffle="sequence")
    sequences = open_source(replace(source.config, dataplane=plane), Local())
    documents = some_documents(sequences)
    num_tokens = int(documents.wanted.sum())
    with contextlib.closing(DocumentReader(sequences)) as reader:
        for repeated in (1, 2):
            reader.prepare(documents, [num_tokens])
            assert sum(size for _, size in loaded) == repeated * 2 * num_tokens
    assert len(loaded) < 2 * len(documents.block), "no documents were copied together"


def test_an_access_to_a_mapped_shard_reads_its_own_page_only(source: Source) -> None:
    path = Path(source.index.data_root) / "a.bin"
    own = slice(*np.searchsorted(source.blocks.shard, [0, 1]).tolist())
    tokens = MegatronFormat().map_tokens(path, source.blocks.first_row[own], source.blocks.offset[own])
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (number,) = (i for i, text in enumerate(mappings) if str(path) in text)
    assert " rr " in mappings[number + 1].splitlines()[0], "MADV_RANDOM is not set"
    assert len(tokens)


def test_a_shard_that_is_truncated_while_it_is_mapped_is_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No comparison before the read.
    monkeypatch.setattr(comparison_pace, "LATE_S", np.inf)
    documents = some_documents(source)
    with contextlib.closing(DocumentReader(source)) as reader:
        # Maps both shards.
        few = documents.select(np.unique(source.blocks.shard[documents.block], return_index=True)[1])
        reader.prepare(few, [int(few.wanted.sum())])
        for name in "ab":
            os.truncate(Path(source.index.data_root) / f"{name}.bin", 0)
        for _ in range(2):
            with pytest.raises(DataError, match="it is shorter than before, or cannot be read"):
                reader.prepare(documents, [int(documents.wanted.sum())])


def test_a_kernel_without_the_call_is_no_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(address: int, num_bytes: int) -> bool:
        calls.append(address)
        return False

    monkeypatch.setattr(block_loads, "load_pages", refuse)
    documents = some_documents(source)
    loads = BlockLoads(source, np.ones(len(source.blocks), np.bool_), files_of(source))
    loads.load(documents, places_of(source, documents))
    assert calls


def test_a_file_is_compared_after_a_read_as_well(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before a read does not see a change that follows it."""
    monkeypatch.setattr(comparison_pace, "PAUSE_PER_DURATION", 0)
    monkeypatch.setattr(comparison_pace, "LATE_S", 0)
    documents = some_documents(source)
    with contextlib.closing(DocumentReader(source)) as reader:
        for _ in range(2):
            reader.prepare(documents, [int(documents.wanted.sum())])
            reader.comparison.check()
        reader.prepare(documents, [int(documents.wanted.sum())])
        for name in "ab":
            with (Path(source.index.data_root) / f"{name}.bin").open("ab") as file:
                file.write(b"more")
        for _ in range(2):
            with pytest.raises(DataError, match="has changed while the run reads it"):
                reader.comparison.check()


def test_every_check_after_a_change_raises(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were read of the changed file may be in memory."""
    documents = some_documents(source)
    with contextlib.closing(DocumentReader(source)) as reader:
        reader.prepare(documents, [int(documents.wanted.sum())])
        reader.comparison.check()
        reader.prepare(documents, [int(documents.wanted.sum())])
        (Path(source.index.data_root) / "a.bin").unlink()
        with pytest.raises(DataError, match="has changed while the run reads it"):
            reader.comparison.compare()
        monkeypatch.setattr(ComparisonPace, "is_due", lambda pace: False)
        with pytest.raises(DataError, match="has changed while the run reads it"):
            reader.comparison.check()
