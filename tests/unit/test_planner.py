"""Plans of small cases, compared with results that are written out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.errors import CommError, MixtureError

ENDLESS = Planner.UNLIMITED


def planner(*capacity: int, batch: int = 4, steps: int = 2, policy: str = "repeat") -> Planner:
    return Planner(
        capacity=np.array(capacity, np.int64),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=steps,
        on_exhausted=policy,
    )


def test_equal_weights_alternate() -> None:
    machine = planner(ENDLESS, ENDLESS)
    plan, _ = machine.plan(PlannerState.start(2), np.array([0.5, 0.5]))
    assert machine.slots(plan).domain.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_a_plan_is_expanded_once_for_its_order_and_the_state_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.array([0.5, 0.5])
    machine = planner(5, ENDLESS, batch=4, steps=2, policy="redistribute")
    first = machine.decide(PlannerState.start(2), weights)
    second = machine.decide(machine.after(first), weights)
    num_expanded = 0
    cut_segments = Planner._cut_segments

    def counted(*arguments: Any) -> Any:
        nonlocal num_expanded
        num_expanded += 1
        return cut_segments(*arguments)

    monkeypatch.setattr(Planner, "_cut_segments", counted)
    other_rank = planner(5, ENDLESS, batch=4, steps=2, policy="redistribute")
    for plan in (first, second):
        other_rank.order(plan)
        state = other_rank.after(plan)
    assert num_expanded == 2
    assert state.cursors.tolist() == machine.after(second).cursors.tolist()


def test_a_rare_domain_is_served_in_proportion() -> None:
    machine = planner(ENDLESS, ENDLESS, batch=10, steps=1)
    state = PlannerState.start(2)
    counts = []
    for _ in range(100):
        plan, state = machine.plan(state, np.array([0.999, 0.001]))
        counts.append(np.count_nonzero(machine.slots(plan).domain == 1))
    assert sum(counts) == 1


def test_a_domain_of_weight_zero_is_never_served() -> None:
    machine = planner(ENDLESS, ENDLESS, ENDLESS)
    plan, _ = machine.plan(PlannerState.start(3), np.array([0.5, 0.0, 0.5]))
    assert 1 not in machine.slots(plan).domain


def test_stop_ends_with_the_last_full_step_before_exhaustion() -> None:
    machine = planner(3, ENDLESS, policy="stop")
    plan, state = machine.plan(PlannerState.start(2), np.array([0.5, 0.5]))
    assert (plan.num_steps, plan.last, state.step) == (1, True, 1)


def test_redistribute_gives_the_share_to_the_others() -> None:
    machine = planner(2, ENDLESS, ENDLESS, batch=12, steps=1, policy="redistribute")
    _, state = machine.plan(PlannerState.start(3), np.array([0.5, 0.25, 0.25]))
    assert state.cursors.tolist() == [2, 5, 5]
    following, _ = machine.plan(state, np.array([0.5, 0.25, 0.25]))
    assert not following.last
    assert 0 not in machine.slots(following).domain


@pytest.mark.parametrize("policy", ["stop", "repeat"])
def test_a_dropped_domain_that_lags_behind_gets_no_sequence_where_the_data_end(policy: str) -> None:
    machine = replace(planner(0, 7, 0, policy=policy), last_batch="pad")
    lags = (np.array([0.13, -0.18, 0.05]) * UNIT).astype(np.int64)
    state = PlannerState(chunk=1, step=2, cursors=np.array([5, 2, 5]), lags=lags - [0, int(lags.sum()), 0])
    plan = machine.decide(state, np.array([0.0, 1.0, 0.0]))
    assert machine.after(plan).cursors.tolist() == [5, 7, 5]
    assert (plan.num_steps, plan.last, plan.lags.tolist()) == (2, True, [0, 0, 0])


def test_the_segments_of_one_plan_in_which_domains_end_stay_in_memory() -> None:
    machine = planner(*range(3, 63, 2), steps=20, policy="redistribute")
    state = PlannerState.start(30)
    num_segments = []
    for _ in range(8):
        plan, state = machine.plan(state, np.ones(30))
        num_segments.append(len(machine.segment_counts(plan)))
        assert sum(len(segments) > 1 for _, segments in machine._newest) <= 1
    assert sum(count > 1 for count in num_segments) > 1


def test_no_steps_are_planned_after_the_data_has_ended() -> None:
    machine = planner(4, policy="redistribute")
    plan, state = machine.plan(PlannerState.start(1), np.array([1.0]))
    assert plan.last
    again, _ = machine.plan(state, np.array([1.0]))
    assert (again.num_steps, again.last) == (0, True)


def test_a_plan_costs_24_bytes_per_domain() -> None:
    assert (ChunkPlan.array_size(1000) - ChunkPlan.array_size(0)) * 8 == 24 * 1000


def test_a_damaged_plan_is_refused() -> None:
    plan, _ = planner(ENDLESS).plan(PlannerState.start(1), np.array([1.0]))
    buffer = plan.to_array()
    buffer[5] += 1
    with pytest.raises(CommError, match="damaged"):
        ChunkPlan.from_array(buffer)


@pytest.mark.parametrize("weights", [[np.nan, 1.0], [-0.1, 1.1], [np.inf, 0.0], [0.0, 0.0]])
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(MixtureError):
        planner(ENDLESS, ENDLESS).plan(PlannerState.start(2), np.array(weights))
