"""The expected footprint of a step is that of the steps that are really planned."""

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.dataplane.forecast import forecast
from mixtera_hpc.dataplane.source import open_source
from mixtera_hpc.dataplane.trace import planned


@pytest.mark.parametrize("shuffle", ["none", "block", "window"])
@pytest.mark.parametrize("window", [4, 16])
def test_expected_shards_and_documents_are_close_to_those_of_planned_steps(
    collection: list[str], shuffle: str, window: int
) -> None:
    words = [f"dataplane.shuffle={shuffle}", f"dataplane.shuffle_window={window}", "dataplane.global_batch_size=16"]
    source = open_source(compose([*collection, *words, "dataplane.seq_len=64"]), Local())
    steps, shards, rows = 60, [set() for _ in range(60)], [set() for _ in range(60)]  # type: ignore[var-annotated]
    for record in planned(source, 0, steps):
        for shard, row, _, _ in record["pieces"]:
            shards[record["step"]].add(shard)
            rows[record["step"]].add((shard, row))
    expected = forecast(source, steps).step
    assert expected.shards == pytest.approx(np.mean([len(s) for s in shards]), rel=0.35)
    assert expected.documents == pytest.approx(np.mean([len(r) for r in rows]), rel=0.35)
    assert expected.blocks >= expected.shards and expected.read_amplification >= 1


def test_the_forecast_serves_what_the_planner_serves(collection: list[str]) -> None:
    source = open_source(compose([*collection, "dataplane.seq_len=64", "dataplane.global_batch_size=16"]), Local())
    state = PlannerState.start(source.num_domains)
    while state.step < 64:
        _, state = source.planner.plan(state, source.weights)
    served = [d.served for d in forecast(source, 64).domains]
    assert served == pytest.approx((state.cursors * source.grid.stride).tolist(), abs=source.grid.stride)
