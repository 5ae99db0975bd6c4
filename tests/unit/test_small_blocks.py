"""Runs with more shards than may be open: small blocks are read as a whole, once, and every row is the same."""

import resource
from collections.abc import Iterator

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.residency import small_blocks
from mixtera_hpc.dataplane.reading.rows import row_reader
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers

NUM_SHARDS = 80
"""More than a process with `DESCRIPTORS` descriptors keeps open."""
DESCRIPTORS = 256
ROWS_PER_SHARD = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(NUM_SHARDS):
        rows = [{"text": f"{number} {row} ä" * (1 + row), "meta": {"n": row % 2}} for row in range(ROWS_PER_SHARD)]
        [path] = writers.write_jsonl(folder, rows)
        path.rename(folder / f"{number:03}.jsonl")
    words = [f"data.root={folder}", f"index.path={folder / 'i.h5'}", "index.block_rows=4", "mixture.unit=samples"]
    words += ["data.properties.n=meta.n", "mixture.group_by=[n]", "dataplane.global_batch_size=8"]
    built = compose([*words, "mixture.on_exhausted=redistribute", "mixture.max_epochs=1"])
    build_index(built)
    return built


@pytest.fixture
def _few_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def epoch(config: Config) -> tuple[list[str], int]:
    """Return all rows of an epoch, and the number of blocks that were read as a whole."""
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    blocks = maker._reader._rows._small_blocks
    rows: list[str] = []
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            rows += map(repr, batch.payloads or [])
        if plan.last:
            maker.close()
            return rows, blocks.num_reads if blocks is not None else 0


def test_each_block_is_read_once_where_shards_cannot_stay_open(config: Config, _few_descriptors: None) -> None:
    _, num_reads = epoch(config)
    # Blocks of 4 and of 2 rows.
    assert num_reads == NUM_SHARDS * 2


@pytest.mark.parametrize("largest", [small_blocks.MAX_SMALL_BLOCK_BYTES, 150, 0])
def test_rows_do_not_depend_on_the_number_of_descriptors(
    config: Config, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    expected, num_reads = epoch(config)
    assert num_reads == 0
    request.getfixturevalue("_few_descriptors")
    monkeypatch.setattr(row_reader, "MAX_SMALL_BLOCK_BYTES", largest)
    rows, _ = epoch(config)
    assert rows == expected


def test_the_blocks_used_last_stay_within_the_budget(config: Config) -> None:
    source = open_source(config, Local())
    streams = source.streams()
    numbers: list[int] = []

    def read_bytes(number: int) -> bytes:
        numbers.append(number)
        return bytes(100)

    blocks = small_blocks.SmallBlocks(250, read_bytes)
    for position in (0, 0, 1, 2, 0):
        blocks.read(streams.documents(0, position * 40, position * 40 + 1))
    assert len(numbers) == 4
    assert numbers[3] == numbers[0]
    assert blocks.num_bytes == 200
