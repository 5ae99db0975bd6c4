"""Windows in memory that processes of a node share: each is built once, and no process gets other documents."""

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams
from mixtera_hpc.dataplane.reading.lookup import shared_windows
from mixtera_hpc.dataplane.reading.lookup.shared_windows import SharedWindows
from mixtera_hpc.dataplane.reading.processes import block_memory, reader_memory
from mixtera_hpc.dataplane.reading.processes.block_memory import share_windows
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.formats.codecs.shared_blocks import SharedBlocks
from mixtera_hpc.testing.thread_ranks import run_ranks
from tests.unit.open_files import num_open

Columns = list[NDArray[np.int64]]


@pytest.fixture(autouse=True)
def share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share windows of any size."""
    monkeypatch.setattr(shared_windows, "MIN_SHARED_ROWS", 1)


@pytest.fixture(params=["samples", "tokens"])
def source(request: pytest.FixtureRequest, collection: list[str]) -> Source:
    # Windows of a few blocks.
    words = [f"mixture.unit={request.param}", "dataplane.window_bytes=2000", "dataplane.seq_len=8"]
    return open_source(compose([*collection, *words]), Local())


@pytest.fixture
def memory() -> Iterator[int]:
    """Yield the descriptor of empty memory for windows."""
    shared = share_windows(Local(), 2)
    assert shared is not None
    yield shared.fd


class Reader:
    """Streams that share windows, and the blocks that they read from the index."""

    def __init__(self, source: Source, fd: int | None) -> None:
        self.blocks: list[int] = []
        read = source.samples.make_block_reader()

        def counted(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
            self.blocks += blocks.tolist()
            return read(blocks, only_sizes=only_sizes)

        shared = None if fd is None else SharedWindows(fd)
        self.streams = DomainStreams(source.layout, counted, source.samples.domain_of, shared=shared)

    def epoch(self, source: Source, epoch: int) -> Columns:
        """Return all documents of an epoch of all domains, as columns."""
        items = source.layout.epoch_items()
        filled = np.flatnonzero(items)
        begins = epoch * items[filled]
        documents = self.streams.documents_of_spans(filled, begins, begins + items[filled])
        return [getattr(documents, name) for name in ("block", "row", "offset", "length", "size", "first", "last")]


def assert_equal(a: Columns, b: Columns) -> None:
    assert all(np.array_equal(left, right) for left, right in zip(a, b, strict=True))


def test_a_window_is_built_by_one_reader(source: Source, memory: int) -> None:
    expected = Reader(source, None)
    first = Reader(source, memory)
    second = Reader(source, memory)
    for epoch in range(3):
        assert_equal(first.epoch(source, epoch), expected.epoch(source, epoch))
        assert_equal(second.epoch(source, epoch), expected.epoch(source, epoch))
    assert first.blocks
    assert not second.blocks


def test_readers_at_the_same_time_get_the_same_documents(source: Source, memory: int) -> None:
    expected = [Reader(source, None).epoch(source, epoch) for epoch in range(6)]
    failures: list[BaseException] = []

    def read_all() -> None:
        try:
            reader = Reader(source, memory)
            for epoch, columns in enumerate(expected):
                assert_equal(reader.epoch(source, epoch), columns)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_window_in_progress_is_read_last(source: Source, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str, int]] = []

    class Busy(SharedBlocks):
        """Blocks of which another process decodes the first one that is asked for."""

        def read_unless_busy(self, name: str, offset: int, *functions: object) -> object:
            if not names:
                names.append((name, offset))
                return None
            assert (name, offset) != names[0]
            return super().read_unless_busy(name, offset, *functions)  # type: ignore[arg-type]

        def read(self, name: str, offset: int, *functions: object) -> object:
            names.append((name, offset))
            return super().read(name, offset, *functions)  # type: ignore[arg-type]

    expected = Reader(source, None).epoch(source, 0)
    monkeypatch.setattr(shared_windows, "SharedBlocks", Busy)
    assert_equal(Reader(source, memory).epoch(source, 0), expected)
    assert names[1:] == names[:1]


def test_every_source_has_memory_of_its_own(collection: list[str]) -> None:
    """Windows of another selection or seed have the same names."""
    config = compose(collection)
    sources = run_ranks(2, lambda comm: [open_source(config, comm) for _ in range(2)])
    memories = [[source.memory.windows for source in of_rank] for of_rank in sources]
    inodes = [[os.fstat(memory.fd).st_ino for memory in of_rank if memory is not None] for of_rank in memories]
    assert inodes[0] == inodes[1]
    assert len(set(inodes[0])) == 2
    # Reading processes get it too.
    _, arguments = sources[0][0].__reduce__()
    assert arguments[-1].windows is memories[0][0]


def test_a_window_that_the_memory_does_not_keep_is_built_without_its_lock(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_memory, "WINDOW_BYTES", 1 << 10)
    shared = share_windows(Local(), 2)
    assert shared is not None
    shared_names: list[str] = []

    class Named(SharedBlocks):
        """Blocks whose names are recorded."""

        def read_unless_busy(self, name: str, offset: int, *functions: object) -> object:
            shared_names.append(name)
            return super().read_unless_busy(name, offset, *functions)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_windows, "SharedBlocks", Named)
    assert_equal(Reader(source, shared.fd).epoch(source, 0), Reader(source, None).epoch(source, 0))
    num_windows = sum(len(source.layout.epoch_order(domain, 0).starts) - 1 for domain in range(source.num_domains))
    assert 0 < len(shared_names) < num_windows


def read_steps(config: Config, comm: Communicator) -> list[str]:
    """Return the batches of a rank."""
    source = open_source(config, comm)
    maker = BatchMaker(source, BatchSlice(group=comm.rank, num_groups=comm.size), audit=False)
    state = PlannerState.start(source.num_domains)
    batches: list[str] = []
    while len(batches) < 40:
        plan, state = source.planner.plan(state, source.weights)
        batches += [f"{batch.domain_ids} {batch.payloads}" for batch in maker.batches(plan, 0)]
    maker.close()
    return batches


def test_ranks_that_share_windows_serve_the_same_batches(
    collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["mixture.unit=samples", "dataplane.window_bytes=2000", "mixture.on_exhausted=repeat"]
    config = compose([*collection, *words, "dataplane.global_batch_size=8"])
    before = num_open()
    shared = run_ranks(4, lambda comm: read_steps(config, comm))
    assert num_open() <= before
    monkeypatch.setattr(reader_memory, "share_windows", lambda _comm, _readers: None)
    assert run_ranks(4, lambda comm: read_steps(config, comm)) == shared
