"""The cost of decoding that plan states agrees with a counted run, and too much of it is refused."""

import json
import random
import re
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.processes.block_memory import share_blocks
from mixtera_hpc.dataplane.reading.processes.reader_memory import ReaderMemory
from mixtera_hpc.dataplane.reading.residency.decode_cost import cost_with_more_lanes, decode_cost
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.trace.forecast import MixtureForecast, forecast_mixture

BATCH = 48
SHARDS = 40
ROWS = 90


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides for files of one frame each, in which two domains alternate."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / "data").mkdir()
    rng = random.Random(0)
    for shard in range(SHARDS):
        # Every third row belongs to the second domain.
        rows = [{"text": rng.randbytes(200).hex(), "source": "ab"[row % 3 == 0]} for row in range(ROWS)]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"data/{shard:03d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    words = [
        f"data.root={folder / 'data'}",
        f"index.path={folder / 'i.h5'}",
        "data.properties.source=source",
        "mixture.unit=samples",
        "mixture.group_by=[source]",
        "mixture.max_epochs=1",
        "mixture.on_exhausted=redistribute",
        f"dataplane.global_batch_size={BATCH}",
        "dataplane.window_bytes=1",
        "dataplane.lanes=4",
    ]
    build_index(compose(words))
    return words


def per_step(forecast: MixtureForecast) -> NDArray[np.float64]:
    """Return the items of each domain in a step."""
    return np.array([domain.served / forecast.num_steps for domain in forecast.domains])


def counted(source: Source, ranks: int) -> tuple[float, int]:
    """Return the bytes decoded per byte served over one epoch, and the bytes in memory at most."""
    decoded = served = most = 0
    for rank in range(ranks):
        state = PlannerState.start(source.num_domains)
        with closing(BatchMaker(source, BatchSlice(group=rank, num_groups=ranks), audit=False)) as maker:
            while True:
                plan, state = source.planner.plan(state, source.weights)
                for batch in maker.batches(plan, 0):
                    served += sum(len(json.dumps(row)) + 1 for row in batch.payloads or [])
                    most = max(most, maker._reader._rows._block_rows.resident(raw=True).num_bytes)
                if plan.last:
                    break
            decoded += maker._reader._rows._cache.loaded_bytes
    return decoded / served, most


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_estimate_agrees_with_a_counted_run(overrides: list[str], ranks: int) -> None:
    # A block has 40 kB; the rows of four lanes fit, the collection does not.
    source = open_source(compose([*overrides, "data.cache_bytes=800_000"]), Local())
    shape = JobShape(num_groups=ranks, copies=1, readers_per_node=1)
    forecast = forecast_mixture(source, 10**6)
    cost = decode_cost(source, per_step(forecast), shape)
    assert cost is not None
    # Both domains pass through the files at one speed.
    assert cost.lower_bound == pytest.approx(1, rel=0.02)
    actual, most = counted(source, ranks)
    assert cost.amplification == pytest.approx(actual, rel=0.35)
    assert most <= 600_000
    if ranks == 1:
        assert actual <= 1.3 * cost.lower_bound


def counted_on_nodes(source: Source, ranks: int, per_node: int) -> float:
    """Return the bytes decoded per byte served over one epoch, where ranks of a node share what they decode."""
    decoded = served = 0
    for first in range(0, ranks, per_node):
        memory = share_blocks(Local(), source.config, source.index.shard_formats, per_node)
        on_node = replace(source, memory=ReaderMemory(num_readers=per_node, blocks=memory))
        slices = [BatchSlice(group=first + number, num_groups=ranks) for number in range(per_node)]
        makers = [BatchMaker(on_node, of_rank, audit=False) for of_rank in slices]
        state = PlannerState.start(source.num_domains)
        while True:
            plan, state = source.planner.plan(state, source.weights)
            for maker in makers:
                for batch in maker.batches(plan, 0):
                    served += sum(len(json.dumps(row)) + 1 for row in batch.payloads or [] if row is not None)
            if plan.last:
                break
        for maker in makers:
            decoded += maker._reader._rows._cache.loaded_bytes
            maker.close()
    return decoded / served


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_ranks_of_a_node_count_once(overrides: list[str], nodes: int) -> None:
    source = open_source(compose([*overrides, "data.cache_bytes=1_600_000"]), Local())
    forecast = forecast_mixture(source, 10**6)
    shape = JobShape.of_job(source, nodes * 4, 4)
    cost = decode_cost(source, per_step(forecast), shape)
    alone = decode_cost(source, per_step(forecast), replace(shape, num_nodes=None))
    assert cost is not None and alone is not None
    assert cost.amplification == pytest.approx(counted_on_nodes(source, nodes * 4, 4), rel=0.35)
    assert alone.amplification > 1.8 * cost.amplification


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_domains_at_different_speeds_decode_for_themselves(overrides: list[str], ranks: int) -> None:
    """With half of a mixture from a third of the rows, each block is decoded for each of the domains."""
    domains = "mixture.domains=[{key: {source: a}, weight: 0.5}, {key: {source: b}, weight: 0.5}]"
    words = [word for word in overrides if "group_by" not in word]
    words += ["data.cache_bytes=800_000", "mixture.kind=static", domains, "mixture.on_exhausted=stop"]
    source = open_source(compose(words), Local())
    forecast = forecast_mixture(source, 10**6)
    cost = decode_cost(source, per_step(forecast), JobShape(num_groups=ranks, copies=1, readers_per_node=1))
    assert cost is not None
    # Σ weight / share, where rows have 2/3 and 1/3 of the domains.
    assert cost.lower_bound == pytest.approx(0.5 / (2 / 3) + 0.5 / (1 / 3), rel=0.03)
    # Half of this small collection is in memory, so some blocks are still there for the other domain.
    actual, _ = counted(source, ranks)
    assert actual <= cost.amplification <= 1.5 * actual


@pytest.mark.parametrize("num_bytes", [20_000, 0])
def test_a_run_is_refused_and_the_memory_that_it_lacks_is_named(num_bytes: int, overrides: list[str]) -> None:
    words = [*overrides, f"data.cache_bytes={num_bytes}", "data.max_amplification=2"]
    with pytest.raises(ConfigError, match=rf"data\.cache_bytes={num_bytes} per node is too small: set") as refused:
        DataPlane.open(compose(words))
    needed = int(re.search(r"set data\.cache_bytes=(\d+)", str(refused.value))[1])
    with DataPlane.open(compose([*overrides, f"data.cache_bytes={needed}", "data.max_amplification=2"])) as plane:
        next(iter(plane))


def test_too_little_memory_decodes_more_but_not_for_every_row(overrides: list[str]) -> None:
    """A quarter of the memory decodes every unit a few times, not once per read."""
    source = open_source(compose([*overrides, "data.cache_bytes=80_000"]), Local())
    shape = JobShape(num_groups=1, copies=1, readers_per_node=1)
    forecast = forecast_mixture(source, 10**6)
    cost = decode_cost(source, per_step(forecast), shape)
    assert cost is not None
    actual, _ = counted(source, 1)
    assert 1.3 * cost.lower_bound < actual <= 2 * cost.amplification


def test_plan_prints_the_cost_and_refuses_too_much(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*overrides, "data.cache_bytes=800_000"]
    assert main(["plan", *words]) == 0
    assert "bytes per byte served, at least 1.0 with this layout" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *words, "data.max_amplification=0.9"]) == 2
    message = capsys.readouterr().err
    assert "data.max_amplification=0.9" in message and "dataplane.lanes" in message


def test_lanes_for_the_number_of_nodes_are_named(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*overrides, "data.cache_bytes=1_500_000"]
    source = open_source(compose(words), Local())
    served = per_step(forecast_mixture(source, 5))
    nodes = JobShape(num_groups=8, copies=1, readers_per_node=2, num_nodes=4)
    now = decode_cost(source, served, nodes)
    better = cost_with_more_lanes(source, served, nodes)
    assert now is not None
    assert better is not None
    lanes, cost = better
    assert lanes == 16
    assert cost == decode_cost(open_source(compose([*words, "dataplane.lanes=16"]), Local()), served, nodes)
    assert cost.amplification < 0.8 * now.amplification

    # One node shares no lane with others, and a number of lanes that needs more memory is not named.
    assert cost_with_more_lanes(source, served, replace(nodes, num_nodes=1)) is None
    small = open_source(compose([*overrides, "data.cache_bytes=1_400_000"]), Local())
    assert cost_with_more_lanes(small, served, nodes) is None

    assert main(["plan", *words, "job.nodes=4", "job.ranks_per_node=2"]) == 0
    assert "With dataplane.lanes=16, set before the run begins, they decode" in " ".join(
        capsys.readouterr().out.split()
    )
