"""The estimated footprint of a step is close to that of planned steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace import forecast
from mixtera_hpc.trace.forecast import forecast_mixture, sampled_chunks
from mixtera_hpc.trace.list import planned_sequences

pytestmark = pytest.mark.slow
"""Compares forecasts with served runs."""


@pytest.mark.parametrize("shuffle", ["none", "block", "window"])
@pytest.mark.parametrize("window", [4, 16])
def test_the_estimated_footprint_is_close_to_that_of_planned_steps(
    collection: list[str], shuffle: str, window: int
) -> None:
    # Blocks have about 5 kB on average.
    words = [f"dataplane.shuffle={shuffle}", f"dataplane.window_bytes={window * 5000}"]
    words += ["dataplane.lanes=4", "dataplane.global_batch_size=16"]
    source = open_source(compose([*collection, *words, "dataplane.seq_len=64"]), Local())
    rows: list[set[tuple[int, str, int]]] = [set() for _ in range(60)]
    for record in planned_sequences(source, 0, 60):
        rows[record["step"]] |= {(record["domain_id"], shard, row) for shard, row, _, _ in record["segments"]}
    shards = np.mean([len({shard for _, shard, _ in each}) for each in rows])
    blocks = [{(domain, block_of(source, shard, row)) for domain, shard, row in each} for each in rows]
    row_bytes = source.blocks.length / source.blocks.rows
    read = sum(int(source.blocks.length[block]) for each in blocks for _, block in each)
    used = sum(float(row_bytes[block_of(source, shard, row)]) for each in rows for _, shard, row in each)
    expected = forecast_mixture(source, 60).step
    assert expected.shards >= 0.9 * shards
    assert shuffle == "none" or expected.shards == pytest.approx(shards, rel=0.35)
    assert expected.documents == pytest.approx(np.mean([len(each) for each in rows]), rel=0.1)
    assert expected.blocks == pytest.approx(np.mean([len(each) for each in blocks]), rel=0.2)
    assert expected.read_amplification == pytest.approx(read / used, rel=0.2)


def block_of(source: Source, shard: str, row: int) -> int:
    """Return the block that a row lies in."""
    blocks = np.flatnonzero(source.blocks.shard == source.index.shard_paths.index(shard))
    return int(blocks[np.searchsorted(source.blocks.first_row[blocks], row, side="right") - 1])


def test_documents_longer_than_sequences_count_in_every_step_that_reads_them(collection: list[str]) -> None:
    source = open_source(compose([*collection, "dataplane.global_batch_size=16", "dataplane.seq_len=8"]), Local())
    touched = [
        {(shard, row) for shard, row, _, _ in r["segments"]} | {r["step"]} for r in planned_sequences(source, 0, 60)
    ]
    per_step = [set().union(*touched[first : first + 16]) for first in range(0, len(touched), 16)]
    assert forecast_mixture(source, 60).step.documents == pytest.approx(
        np.mean([len(s) - 1 for s in per_step]), rel=0.2
    )


@pytest.mark.parametrize(("on_exhausted", "max_epochs"), [("redistribute", 1.0), ("redistribute", 2.0), ("stop", 1.0)])
def test_the_forecast_names_the_step_in_which_a_domain_runs_out(
    collection: list[str], on_exhausted: str, max_epochs: float
) -> None:
    """Exact up to the steps between two sequences of the domain, also if shares grow after other domains ran out."""
    words = ["mixture.temperature=2.0", f"mixture.on_exhausted={on_exhausted}", f"mixture.max_epochs={max_epochs}"]
    source = open_source(
        compose([*collection, *words, "dataplane.seq_len=16", "dataplane.global_batch_size=16"]), Local()
    )
    counts = np.zeros(source.num_domains, np.int64)
    last_step = {}
    for record in planned_sequences(source, 0, 10**6):
        counts[record["domain_id"]] += 1
        if counts[record["domain_id"]] == source.planner.capacity[record["domain_id"]]:
            last_step[record["domain_id"]] = record["step"]
    expected = forecast_mixture(source, 10**6)
    assert expected.num_steps == counts.sum() // 16
    run_out = {d: e.runs_out_at_step for d, e in enumerate(expected.domains) if e.runs_out_at_step is not None}
    assert run_out and last_step.keys() <= run_out.keys()
    for domain, step in run_out.items():
        between = expected.num_steps / source.planner.capacity[domain]
        assert -1 <= step - last_step.get(domain, expected.num_steps) <= 1 + between


def test_the_forecast_serves_what_the_planner_serves(collection: list[str]) -> None:
    source = open_source(compose([*collection, "dataplane.seq_len=64", "dataplane.global_batch_size=16"]), Local())
    state = PlannerState.start(source.num_domains)
    while state.step < 64:
        _, state = source.planner.plan(state, source.weights)
    served = [d.served for d in forecast_mixture(source, 64).domains]
    assert served == pytest.approx((state.cursors * source.grid.stride).tolist(), abs=source.grid.stride)


def test_a_long_schedule_is_forecast_from_sampled_weights(
    collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(start: int, weight: float) -> dict[str, Any]:
        domain = {"key": {"source": "ast"}, "weight": weight}
        return {"start": start, "kind": "static", "domains": [domain], "remainder": {"weight": 1 - weight}}

    schedule = {"shape": "linear", "stages": [stage(0, 0.9), stage(9_000, 0.1)]}
    plain = {"kind": "schedule", "on_exhausted": "repeat", "schedule": schedule}
    config = compose(collection)
    plane = replace(config.dataplane, chunk_steps=1)
    source = open_source(replace(config, mixture=from_plain(MixtureConfig, plain, "mixture"), dataplane=plane), Local())
    assert sampled_chunks(source, 9_000) == 3
    sampled = forecast_mixture(source, 9_000)
    monkeypatch.setattr(forecast, "MAX_SAMPLED_CHUNKS", 1 << 40)
    exact = forecast_mixture(source, 9_000)
    assert [d.served for d in sampled.domains] == pytest.approx([d.served for d in exact.domains], rel=0.01)


def test_a_step_behind_too_many_chunks_is_refused(collection: list[str]) -> None:
    source = open_source(compose([*collection, "mixture.on_exhausted=repeat"]), Local())
    with pytest.raises(ConfigError, match=r"plan\.first_step is 10{18}, but at most \d+ steps are planned ahead"):
        next(planned_sequences(source, 10**18, 1))
