"""Rows that other domains need later stay in memory when a block is decoded, and nothing else of it does."""

import json
import random
import re
from collections import Counter
from contextlib import closing
from typing import NamedTuple

import numpy as np
import pytest
import zstandard

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.residency import rows_ahead
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

SHARDS = 96
ROWS = 60
BLOCK_BYTES = ROWS * 440
DOMAINS = "abcd"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides for files of one frame each, whose shares of four domains differ from file to file."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / "data").mkdir()
    rng = random.Random(0)
    for shard in range(SHARDS):
        weights = [rng.random() + 0.1 for _ in DOMAINS]
        sources = rng.choices(DOMAINS, weights, k=ROWS)
        rows = [{"text": rng.randbytes(200).hex(), "source": source} for source in sources]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"data/{shard:03d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    words = [
        f"data.root={folder / 'data'}",
        f"index.path={folder / 'i.h5'}",
        "data.properties.source=source",
        "data.materialize=never",
        f"data.cache_bytes={16 * BLOCK_BYTES}",
        "mixture.unit=samples",
        "mixture.group_by=[source]",
        "mixture.max_epochs=2",
        "mixture.on_exhausted=redistribute",
        "dataplane.global_batch_size=8",
        "dataplane.window_bytes=1",
        "dataplane.lanes=4",
    ]
    build_index(compose(words))
    return words


class Epochs(NamedTuple):
    """The rows and the reads of a rank until the end of the data."""

    rows: list[str]
    decoded_bytes: int
    most_bytes: int
    """Bytes of rows in memory at most."""


def read_all(source: Source, rank: int = 0, ranks: int = 1) -> Epochs:
    rows: list[str] = []
    most_bytes = 0
    state = PlannerState.start(source.num_domains)
    with closing(BatchMaker(source, BatchSlice(group=rank, num_groups=ranks), audit=False)) as maker:
        reader = maker._reader._rows
        while True:
            plan, state = source.planner.plan(state, source.weights)
            for batch in maker.batches(plan, 0):
                rows += [json.dumps(row) for row in batch.payloads or []]
                most_bytes = max(most_bytes, reader._block_rows.resident(raw=True).num_bytes)
            if plan.last:
                return Epochs(rows, reader._cache.loaded_bytes, most_bytes)


def test_each_block_is_decoded_about_once_per_epoch(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(compose(overrides), Local())
    read = read_all(source)
    # Two epochs, each of all rows.
    assert len(read.rows) == 2 * SHARDS * ROWS
    assert read.decoded_bytes <= 1.3 * sum(map(len, read.rows))
    assert read.most_bytes <= source.cache_bytes

    monkeypatch.setattr(rows_ahead, "ALL_FIT", 10**9)
    without = read_all(source)
    assert without.rows == read.rows
    assert without.decoded_bytes > 1.3 * read.decoded_bytes


@pytest.mark.parametrize("cache_blocks", [0.1, 2, 6])
def test_rows_do_not_depend_on_the_memory(overrides: list[str], cache_blocks: float) -> None:
    expected = read_all(open_source(compose(overrides), Local()))
    words = [*overrides, f"data.cache_bytes={int(cache_blocks * BLOCK_BYTES)}"]
    source = open_source(compose(words), Local())
    read = read_all(source)
    assert read.rows == expected.rows
    # The window that was loaded last stays, whatever the budget.
    assert read.most_bytes <= source.cache_bytes + 2 * BLOCK_BYTES


def test_rows_are_kept_again_after_the_memory_was_full(overrides: list[str]) -> None:
    source = open_source(compose(overrides), Local())
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        ahead = maker._reader._rows._block_rows.resident(raw=True)._ahead
        assert ahead is not None
        for _ in maker.batches(plan, 0):
            assert ahead.num_bytes
            # Not even the rows that are needed next fit.
            ahead.limit(-1)
            assert not ahead.num_bytes
            assert ahead._horizon >= 1
            break


def test_a_rank_keeps_only_rows_of_its_own_lanes(overrides: list[str]) -> None:
    # With 16 sequences of every lane in a step, the borders of ranks stay in the middle of lanes.
    source = open_source(compose([*overrides, "dataplane.global_batch_size=64"]), Local())
    ranks = [read_all(source, rank, 4) for rank in range(4)]
    assert all(read.most_bytes <= source.cache_bytes for read in ranks)
    # Every lane is divided between two ranks.
    num_bytes = sum(map(len, read_all(source).rows))
    assert sum(read.decoded_bytes for read in ranks) <= 2 * 1.3 * num_bytes


def test_a_domain_at_another_speed_does_not_take_the_memory(overrides: list[str]) -> None:
    """The rows that a slow domain needs much later are given up first."""
    weights = {"a": 0.49, "b": 0.49, "c": 0.01, "d": 0.01}
    domains = ", ".join(f"{{key: {{source: {name}}}, weight: {weight}}}" for name, weight in weights.items())
    words = [word for word in overrides if not re.search("group_by|exhausted|max_epochs", word)]
    words += ["mixture.kind=static", f"mixture.domains=[{domains}]", "mixture.on_exhausted=stop"]
    source = open_source(compose([*words, "mixture.max_epochs=1"]), Local())
    read = read_all(source)
    counts = Counter(json.loads(row)["source"] for row in read.rows)
    shares = source.layout.epoch_items() / source.layout.epoch_items().sum()
    own_rows = np.array([counts[name] for name in DOMAINS]) / shares
    # a and b pass through the files together, c and d for themselves.
    most = (own_rows[:2].max() + own_rows[2:].sum()) * BLOCK_BYTES / ROWS
    assert read.decoded_bytes <= 1.3 * most
