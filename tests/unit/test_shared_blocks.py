"""Decoded blocks in memory that processes share: each is decoded once, and no process gets other bytes."""

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.processes import block_memory
from mixtera_hpc.dataplane.reading.processes.block_memory import share_blocks
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.formats.codecs import shared_blocks
from mixtera_hpc.formats.codecs.shared_blocks import DecodedLines, SharedBlocks
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers
from mixtera_hpc.testing.thread_ranks import run_ranks
from tests.unit.open_files import num_open

RING_BYTES = 100_000
ALL_ROWS = np.arange(3)


@pytest.fixture
def memory() -> Iterator[int]:
    """Yield the descriptor of empty memory."""
    fd = os.memfd_create("mixtera-test")
    os.ftruncate(fd, SharedBlocks.memory_bytes(RING_BYTES))
    yield fd
    os.close(fd)


class Blocks:
    """Blocks of three lines, and a count of those that were decoded."""

    def __init__(self, blocks: SharedBlocks, line_bytes: int = 3000) -> None:
        self.blocks = blocks
        self.line_bytes = line_bytes
        self.num_decoded = 0

    def lines(self, number: int, rows: np.ndarray = ALL_ROWS) -> list[bytes]:
        def decode() -> DecodedLines:
            self.num_decoded += 1
            data = b"".join(self.expected(number))
            return DecodedLines(data, np.cumsum([len(line) for line in self.expected(number)]))

        return self.blocks.lines("shard", number, rows, decode)

    def expected(self, number: int) -> list[bytes]:
        return [f"{number} {row} ".encode() * (self.line_bytes // 8 + row) for row in range(3)]


def test_a_block_is_decoded_by_one_reader(memory: int) -> None:
    first = Blocks(SharedBlocks(memory))
    second = Blocks(SharedBlocks(memory))
    for number in range(5):
        assert first.lines(number) == first.expected(number)
        assert second.lines(number, np.array([0, 2])) == [first.expected(number)[i] for i in (0, 2)]
    assert (first.num_decoded, second.num_decoded) == (5, 0)


def test_memory_without_room_for_a_block_keeps_none() -> None:
    fd = os.memfd_create("mixtera-test")
    os.ftruncate(fd, SharedBlocks.memory_bytes(0))
    readers = [Blocks(SharedBlocks(fd)) for _ in range(2)]
    os.close(fd)
    for reader in readers:
        assert reader.lines(1) == reader.expected(1)
        reader.blocks.close()
    assert [reader.num_decoded for reader in readers] == [1, 1]


def test_many_readers_do_not_keep_a_block_out(memory: int) -> None:
    """Readers whose turns overlap leave no moment in which the directory is free."""
    writer = Blocks(SharedBlocks(memory, patience_s=1.0))
    writer.blocks.read("shard", 0, lambda *_: b"", lambda: ([b"read by all"], b""))
    has_ended = threading.Event()

    def take_slowly(_memory: mmap.mmap, _begin: int, _end: int) -> bytes:
        time.sleep(0.002)
        return b""

    def read_all_the_time() -> None:
        blocks = SharedBlocks(memory)
        while not has_ended.is_set():
            blocks.read("shard", 0, take_slowly, lambda: ([], b""))
        blocks.close()

    threads = [threading.Thread(target=read_all_the_time) for _ in range(8)]
    for thread in threads:
        thread.start()
    reader = Blocks(SharedBlocks(memory))
    try:
        for number in range(1, 4):
            assert writer.lines(number) == reader.lines(number) == reader.expected(number)
    finally:
        has_ended.set()
        for thread in threads:
            thread.join()
    for blocks in (writer.blocks, reader.blocks):
        blocks.close()
    assert (writer.num_decoded, reader.num_decoded) == (3, 0)


def test_a_reader_that_does_not_wait_goes_on(memory: int) -> None:
    first = SharedBlocks(memory)
    second = SharedBlocks(memory)
    results: list[bytes | None] = []

    def take(own: mmap.mmap, begin: int, end: int) -> bytes:
        return own[begin:end]

    def decode() -> tuple[list[bytes], bytes]:
        # While the first reader decodes the block, the second one gets another block, but not this one.
        for offset in (0, 1):
            results.append(second.read_unless_busy("shard", offset, take, lambda: ([b"other"], b"other")))
        return [b"own"], b"own"

    assert first.read_unless_busy("shard", 0, take, decode) == b"own"
    assert results == [None, b"other"]
    assert second.read_unless_busy("shard", 0, take, decode) == b"own"


def test_new_blocks_take_the_place_of_the_oldest_ones(memory: int) -> None:
    readers = [Blocks(SharedBlocks(memory)) for _ in range(2)]
    random = np.random.default_rng(0)
    # Blocks of sizes that do not divide the ring, asked for in any order.
    for number in random.integers(0, 40, 2000).tolist():
        reader = readers[number % 2]
        reader.line_bytes = 1000 + 80 * number
        assert reader.lines(number) == reader.expected(number)
    assert 40 < sum(reader.num_decoded for reader in readers) < 2000


def test_a_block_that_is_being_written_keeps_its_place(memory: int) -> None:
    other = Blocks(SharedBlocks(memory))

    class Slow(SharedBlocks):
        """Blocks during whose writing another reader asks for more than the ring holds."""

        def _store(self, *arguments: Any) -> None:
            self.is_storing = True
            super()._store(*arguments)

        def _place(self, start: int) -> int:
            if self.is_storing:
                self.is_storing = False
                for number in range(1, 30):
                    assert other.lines(number) == other.expected(number)
            return super()._place(start)

    slow = Slow(memory)
    reader = Blocks(slow)
    assert reader.lines(0) == reader.expected(0)
    # The newest ones first: they are still in the ring.
    for number in reversed(range(30)):
        assert other.lines(number) == other.expected(number)


def test_a_block_that_is_too_large_is_decoded_each_time(memory: int) -> None:
    reader = Blocks(SharedBlocks(memory), RING_BYTES)
    assert reader.lines(0) == reader.lines(0) == reader.expected(0)
    assert reader.num_decoded == 2


def run_readers(readers: list[Callable[[], None]], entered: threading.Event) -> None:
    """Run functions in threads, and begin all but the first one after an event."""
    threads = [threading.Thread(target=read) for read in readers]
    threads[0].start()
    entered.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)


def test_readers_decode_a_block_that_is_too_large_at_the_same_time(memory: int) -> None:
    entered = threading.Event()
    others = threading.Barrier(3)
    data = bytes(RING_BYTES)
    results: list[list[bytes]] = []

    def decode_first() -> DecodedLines:
        entered.set()
        # Time for the others to wait for this reader.
        time.sleep(0.1)
        return DecodedLines(data, np.array([1, len(data)]))

    def decode_together() -> DecodedLines:
        # Raises an error if one of them waits for another one.
        others.wait(timeout=120)
        return DecodedLines(data, np.array([1, len(data)]))

    def read(decode: Callable[[], DecodedLines]) -> None:
        results.append(SharedBlocks(memory, patience_s=600).lines("s", 0, np.array([0]), decode))

    run_readers([partial(read, decode_first), *[partial(read, decode_together)] * 3], entered)
    assert results == [[data[:1]]] * 4


def test_readers_wait_for_the_one_that_decodes(memory: int) -> None:
    entered = threading.Event()
    counts: list[int] = []

    def decode() -> DecodedLines:
        counts.append(1)
        entered.set()
        time.sleep(0.2)
        return DecodedLines(b"abc", np.array([1, 3]))

    def read() -> None:
        assert SharedBlocks(memory).lines("s", 0, np.array([1]), decode) == [b"bc"]

    run_readers([read] * 4, entered)
    assert len(counts) == 1


def test_a_block_that_cannot_be_decoded_is_tried_again(memory: int) -> None:
    reader = Blocks(SharedBlocks(memory))

    def fail() -> DecodedLines:
        raise ValueError

    with pytest.raises(ValueError):
        reader.blocks.lines("shard", 0, ALL_ROWS, fail)
    assert reader.lines(0) == reader.expected(0)


KILLED = """
import os, signal, sys
import numpy as np
from mixtera_hpc.formats.codecs.shared_blocks import DecodedLines, SharedBlocks

blocks = SharedBlocks(int(sys.argv[1]))
if sys.argv[2] == "decoding":
    blocks.lines("shard", 0, np.arange(3), lambda: os.kill(os.getpid(), signal.SIGKILL))
# A block whose bytes are not all there.
blocks._place = lambda start: os.kill(os.getpid(), signal.SIGKILL)
blocks.lines("shard", 0, np.arange(3), lambda: DecodedLines(b"x" * 20_000, np.array([1, 2, 20_000])))
"""


@pytest.mark.parametrize("when", ["decoding", "writing"])
def test_a_killed_process_blocks_nobody(memory: int, when: str) -> None:
    command = [sys.executable, "-c", KILLED, str(memory), when]
    killed = subprocess.run(command, pass_fds=[memory], timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    reader = Blocks(SharedBlocks(memory))
    # Twice through the ring, so that the place of the killed process is used again.
    for number in [*range(30), *range(30)]:
        assert reader.lines(number) == reader.expected(number)
    assert Blocks(SharedBlocks(memory)).lines(29) == reader.expected(29)


STOPPED = """
import os, signal, sys
import numpy as np
from mixtera_hpc.formats.codecs.shared_blocks import SharedBlocks

def stop():
    print("decoding", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

SharedBlocks(int(sys.argv[1])).lines("shard", 0, np.arange(3), stop)
"""


def test_a_block_of_a_stopped_process_is_decoded_by_its_readers(memory: int, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", STOPPED, str(memory)]
    with subprocess.Popen(command, pass_fds=[memory], stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None and stopped.stdout.readline() == "decoding\n"
        reader = Blocks(SharedBlocks(memory, patience_s=0.1))
        assert reader.lines(0) == reader.lines(0) == reader.expected(0)
        # It is reported once, and other blocks are still shared.
        assert reader.lines(1) == reader.lines(1) == reader.expected(1)
        assert reader.num_decoded == 3
        assert caplog.text.count("it is stopped or very slow") == 1
        stopped.kill()
    assert reader.lines(0) == reader.lines(0) == reader.expected(0)
    assert reader.num_decoded == 4


def test_nobody_waits_for_a_process_that_is_stopped_with_the_directory(memory: int) -> None:
    owner = SharedBlocks(memory)
    reader = Blocks(SharedBlocks(memory, patience_s=0.1))
    with owner._lock(shared_blocks._DIRECTORY):
        for number in range(3):
            assert reader.lines(number) == reader.expected(number)
    assert reader.num_decoded == 3


def test_closing_twice_leaves_other_files_alone(memory: int) -> None:
    blocks = SharedBlocks(memory)
    blocks.close()
    # This descriptor gets the number of the one that was closed.
    other = os.memfd_create("mixtera-test")
    blocks.close()
    os.fstat(other)
    os.close(other)


@pytest.fixture(scope="module", params=["zst", "parquet"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(12):
        rows = [{"text": f"{number} {row} ä" * (1 + row), "meta": {"n": row % 3}} for row in range(20)]
        if request.param == "zst":
            [path] = writers.write_compressed(folder, rows, ending="zst")
            path.rename(folder / f"{number:03}.jsonl.zst")
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:03}.parquet", row_group_size=10)
    words = [f"data.root={folder}", f"index.path={folder / 'i.h5'}", "mixture.unit=samples", "data.materialize=never"]
    words += ["data.properties.n=meta.n", "mixture.group_by=[n]", "dataplane.global_batch_size=8"]
    built = compose([*words, "mixture.on_exhausted=redistribute", "mixture.max_epochs=1", "dataplane.lanes=2"])
    build_index(built)
    return built


def read_epoch(config: Config, comm: Communicator) -> tuple[list[str], int]:
    """Return the rows of a rank, and the bytes that it decoded."""
    source = open_source(config, comm)
    maker = BatchMaker(source, BatchSlice(group=comm.rank, num_groups=comm.size), audit=False)
    rows: list[str] = []
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            rows += map(repr, batch.payloads or [])
        if plan.last:
            maker.close()
            return rows, maker._reader._rows._cache.loaded_bytes


def test_ranks_of_a_node_decode_each_block_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = run_ranks(4, lambda comm: read_epoch(config, comm))
    monkeypatch.setattr(block_memory, "decodes_blocks", lambda _name: False)
    alone = run_ranks(4, lambda comm: read_epoch(config, comm))
    assert [rows for rows, _ in shared] == [rows for rows, _ in alone]
    [one] = run_ranks(1, lambda comm: read_epoch(config, comm))
    assert sum(decoded for _, decoded in shared) == one[1]
    assert sum(decoded for _, decoded in alone) > 2 * one[1]


def test_one_reader_shares_nothing_and_no_descriptor_stays_open(config: Config) -> None:
    before = num_open()
    assert share_blocks(Local(), config, ["jsonl.zst"], 1) is None
    assert share_blocks(Local(), config, ["jsonl", "webdataset"], 4) is None
    run_ranks(2, lambda comm: read_epoch(config, comm)[1])
    assert num_open() <= before


def test_without_proc_nothing_is_shared(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers could not open the memory again for locks of their own."""
    os_open = os.open

    def without_proc(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return os_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", without_proc)
    before = num_open()
    assert share_blocks(Local(), config, ["jsonl.zst"], 2) is None
    assert num_open() <= before
