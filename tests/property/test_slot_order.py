"""A rank expands only the slots it needs, in exactly the order of EDF run slot by slot over the whole segment."""

import heapq
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.apportion import UNIT, advance, quantise_weights
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.segment_order import SegmentOrder

UNLIMITED = 1 << 61


@st.composite
def mixtures(draw: st.DrawFn, num_domains: int) -> np.ndarray:
    """Draw weights of several shapes; some may be 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(["equal", "zipf", "lognormal", "wide", "sparse"]))
    if shape == "equal":
        return np.ones(num_domains)
    if shape == "zipf":
        return 1 / np.arange(1.0, num_domains + 1)
    if shape == "lognormal":
        return rng.lognormal(0, 2, num_domains)
    if shape == "wide":
        return 10.0 ** rng.uniform(-9, 0, num_domains)
    weights = rng.uniform(0, 1, num_domains) * (rng.uniform(0, 1, num_domains) < 0.3)
    weights[rng.integers(num_domains)] = 1
    return weights


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw (lag, weight, counts) of consecutive segments whose weights may change."""
    num_domains = draw(st.integers(1, 40))
    lag = np.zeros(num_domains, np.int64)
    weight = quantise_weights(draw(mixtures(num_domains)))
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            weight = quantise_weights(draw(mixtures(num_domains)))
        num_slots = draw(st.sampled_from([1, 2, 7, 40, 300, 1500]))
        counts, lag_after = advance(lag, weight, num_slots, np.full(num_domains, UNLIMITED))
        drawn.append((lag, weight, counts))
        lag = lag_after
    return drawn


@settings(max_examples=300, deadline=None)
@given(segments(), st.integers(0, 2**32))
def test_any_slots_of_a_segment_are_those_of_edf_over_the_whole_segment(
    drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]], seed: int
) -> None:
    for lag, weight, counts in drawn:
        assert_order_of_reference(lag, weight, counts, seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 400), st.integers(0, 2**32))
def test_the_order_is_that_of_edf_when_lags_exceed_one_sequence(num_domains: int, num_slots: int, seed: int) -> None:
    """After a change of weights, more sequences may be due than there were slots."""
    rng = np.random.default_rng(seed)
    lag = rng.integers(-3 * UNIT, 3 * UNIT, num_domains)
    lag[0] -= lag.sum()
    weight = quantise_weights(rng.dirichlet(np.full(num_domains, rng.choice([0.05, 1.0, 50.0]))))
    counts, _ = advance(lag, weight, num_slots, np.full(num_domains, UNLIMITED))
    assert counts.sum() == num_slots
    assert_order_of_reference(lag, weight, counts, seed)


def assert_order_of_reference(lag: np.ndarray, weight: np.ndarray, counts: np.ndarray, seed: int) -> None:
    expected = reference_order(lag, weight, counts)
    order = SegmentOrder(lag, weight, counts)
    one_hot = np.zeros((len(expected) + 1, len(lag)), np.int64)
    one_hot[np.arange(1, len(expected) + 1), expected] = 1
    prefix_counts = one_hot.cumsum(axis=0)

    slots = np.random.default_rng(seed).integers(0, len(expected) + 1, 20)
    assert np.array_equal(order.counts_before(slots), prefix_counts[slots])
    borders = np.unique(slots).tolist()
    ranges = list(pairwise(borders))[::2]
    ordinals = (prefix_counts[:-1] + 5)[np.arange(len(expected)), expected]
    of_ranges = order.slots(ranges, np.full_like(counts, 5))
    wanted = np.concatenate([np.arange(first, stop) for first, stop in ranges])
    assert np.array_equal(of_ranges.domain, expected[wanted])
    assert np.array_equal(of_ranges.ordinal, ordinals[wanted])
    whole = order.slots([(0, int(counts.sum()))], np.zeros_like(counts))
    assert np.array_equal(whole.domain, expected)


def reference_order(lag: np.ndarray, weight: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the domain of every slot, by EDF slot by slot over all sequences."""
    num_slots = int(counts.sum())
    domain = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    nth = np.arange(num_slots) - np.repeat(np.cumsum(counts) - counts, counts)
    rate = np.maximum(weight, 1)[domain]
    release = np.clip((nth * UNIT - lag[domain]) // rate, 0, num_slots - 1)
    deadline = np.clip(-(-((nth + 1) * UNIT - lag[domain]) // rate), 1, num_slots)
    priority = np.empty(num_slots, np.int64)
    priority[np.lexsort((nth, domain, deadline))] = np.arange(num_slots)
    by_release = np.argsort(release, kind="stable")
    by_priority = np.empty(num_slots, np.int32)
    by_priority[priority] = domain

    # If nothing is released, the sequence that is released next is served early.
    releases = release[by_release].tolist()
    priorities = priority[by_release].tolist()
    waiting: list[int] = []
    served: list[int] = []
    num_released = 0
    for slot in range(num_slots):
        while num_released < num_slots and (releases[num_released] <= slot or not waiting):
            heapq.heappush(waiting, priorities[num_released])
            num_released += 1
        served.append(heapq.heappop(waiting))
    return by_priority[served]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=10),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["repeat", "redistribute", "stop"]),
    st.sampled_from(["drop", "pad"]),
    st.integers(0, 2**32),
)
def test_ranges_of_a_chunk_are_those_of_the_whole_chunk_while_domains_run_out(
    capacity: list[int], batch: int, steps: int, policy: str, last_batch: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    planner = Planner(
        capacity=np.array(capacity, np.int64),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=steps,
        on_exhausted=policy,
        last_batch=last_batch,
    )
    requested = rng.uniform(0.01, 1, len(capacity))
    state = PlannerState.start(len(capacity))
    for _ in range(5):
        plan, after = planner.plan(state, requested)
        whole = planner.slots(plan)
        order = planner.order(plan)
        size = int(rng.integers(1, batch + 1))
        ranges = [(step * batch, step * batch + size) for step in range(plan.num_steps + 1)]
        for (first, stop), part in zip(ranges, order.slots(ranges).steps(), strict=True):
            assert np.array_equal(part.domain, whole.domain[first:stop])
            assert np.array_equal(part.ordinal, whole.ordinal[first:stop])
        for step in range(plan.num_steps):
            counts = np.bincount(whole.domain[: step * batch], minlength=len(capacity))
            at_step = planner.state_at(plan, plan.first_step + step)
            assert np.array_equal(at_step.cursors, plan.cursors + counts)
            assert np.array_equal(order.counts_before(np.array([step * batch]))[0], counts)
            assert at_step.lags.sum() == 0
        state = after
