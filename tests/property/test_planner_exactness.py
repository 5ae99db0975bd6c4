"""Promise 1: every prefix of the served order keeps every domain within 1 sequence of its share."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.apportion import UNIT, _choose_due_first, _ChunkEnd, advance, quantise_weights
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.segment_order import SegmentOrder

ENDLESS = 1 << 61


@st.composite
def weights(draw: st.DrawFn, max_domains: int = 60) -> np.ndarray:
    """Draw weights that are hard to apportion: groups of equal weights (ties), or weights spread from 1 to 1e-9."""
    groups = draw(st.lists(st.tuples(st.integers(1, max_domains // 3), st.floats(-9, 0)), min_size=1, max_size=3))
    jitter = draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if jitter == 1.0:
        return 10.0 ** rng.uniform(-9, 0, sum(count for count, _ in groups))
    flat = np.concatenate([np.full(count, 10.0**exponent) for count, exponent in groups])
    return flat * rng.uniform(1 - jitter, 1 + jitter, len(flat))


def largest_deviation(lag: np.ndarray, weight: np.ndarray, served: np.ndarray) -> int:
    """Return the largest absolute lag of any prefix, in units of 2^-40 sequence.

    A domain's lag is largest before one of its sequences is served, smallest after it, or extreme at the end.
    """
    slot = np.arange(1, len(served) + 1)
    nth = np.empty(len(served), np.int64)
    by_domain = np.argsort(served, kind="stable")
    counts = np.bincount(served, minlength=len(weight))
    nth[by_domain] = slot - np.repeat(np.cumsum(counts) - counts, counts)
    after = lag[served] + weight[served] * slot - nth * UNIT
    before = after + UNIT - weight[served]
    end = lag + weight * len(served) - counts * UNIT
    return int(max(np.abs(each).max(initial=0) for each in (after, before, end)))


def order_slots(lag: np.ndarray, weight: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the domain of every slot if domain k gets `counts[k]` of the slots; shape (counts.sum(),)."""
    segment = SegmentOrder(lag, weight, counts)
    return segment.slots([(0, int(counts.sum()))], np.zeros_like(counts)).domain


def endless(weight: np.ndarray) -> np.ndarray:
    """Return capacities without a limit."""
    return np.full(len(weight), ENDLESS)


@settings(max_examples=300, deadline=None)
@given(weights(), st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_every_prefix_is_exact_whatever_the_chunk_sizes(requested: np.ndarray, chunks: list[int]) -> None:
    weight = quantise_weights(requested)
    lag = np.zeros(len(weight), np.int64)
    forever = endless(weight)
    for num_slots in chunks:
        counts, end = advance(lag, weight, num_slots, forever)
        assert counts.sum() == num_slots
        served = order_slots(lag, weight, counts)
        assert np.array_equal(np.bincount(served, minlength=len(weight)), counts)
        assert largest_deviation(lag, weight, served) < UNIT
        lag = lag + weight * num_slots - counts * UNIT
        assert np.array_equal(end, lag)


@settings(max_examples=15, deadline=None)
@given(weights(2000), st.lists(st.integers(1, 4000), min_size=1, max_size=4))
def test_two_thousand_domains_with_weights_down_to_1e_9_stay_exact(requested: np.ndarray, chunks: list[int]) -> None:
    weight = quantise_weights(requested)
    lag = np.zeros(len(weight), np.int64)
    for num_slots in chunks:
        counts, _ = advance(lag, weight, num_slots, endless(weight))
        assert largest_deviation(lag, weight, order_slots(lag, weight, counts)) < UNIT
        lag = lag + weight * num_slots - counts * UNIT


@settings(max_examples=120, deadline=None)
@given(weights(300), st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_both_rules_for_a_chunks_end_keep_every_prefix_exact(requested: np.ndarray, chunks: list[int]) -> None:
    """`advance` uses due first only where largest remainders are unsafe, but both rules must always be exact."""
    weight = quantise_weights(requested)
    for earliest in (False, True):
        lag = np.zeros(len(weight), np.int64)
        for num_slots in chunks:
            usual, _ = advance(lag, weight, num_slots, endless(weight))
            counts = due_first(lag, weight, num_slots) if earliest else usual
            assert counts.sum() == num_slots
            assert largest_deviation(lag, weight, order_slots(lag, weight, counts)) < UNIT
            lag = lag + weight * num_slots - counts * UNIT


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(1, 40), st.integers(2, 9), st.data())
def test_a_chunk_replanned_from_a_step_inside_it_stays_exact(
    requested: np.ndarray, batch: int, steps: int, data: st.DataObject
) -> None:
    """An edit of a run replans from a step, with its lags and cursors instead of those of the chunk's start."""
    step = data.draw(st.integers(1, steps - 1))
    planner = Planner(
        capacity=endless(requested),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=steps,
        on_exhausted="repeat",
    )
    plan = planner.decide(PlannerState.start(len(requested)), requested)
    state = planner.state_at(plan, step)
    rest = replace(planner, chunk_steps=steps - step)
    before = planner.slots(plan).domain[: step * batch]
    after = rest.slots(rest.decide(state, requested)).domain
    assert np.array_equal(state.cursors, np.bincount(before, minlength=len(requested)))
    served = np.concatenate([before, after])
    assert len(served) == steps * batch
    assert largest_deviation(np.zeros(len(requested), np.int64), plan.weights, served) < UNIT


def due_first(lag: np.ndarray, weight: np.ndarray, num_slots: int) -> np.ndarray:
    """Return the counts of `advance` if it always used its second rule, due first."""
    share = lag + weight * num_slots
    counts = np.maximum(share // UNIT, 0)
    remainder = share - counts * UNIT
    candidates = np.flatnonzero(remainder > 0)
    age = -(-remainder // weight)
    deadline = -((remainder - UNIT) // weight)
    end = _ChunkEnd(num_choices=num_slots - int(counts.sum()), num_slots=num_slots)
    chosen = _choose_due_first(remainder[candidates], age[candidates], deadline[candidates], end)
    counts[candidates[chosen]] += 1
    return counts


@settings(max_examples=100, deadline=None)
@given(st.lists(weights(30), min_size=2, max_size=2), st.integers(1, 64), st.integers(0, 2**32))
def test_changing_weights_stay_exact_at_chunk_boundaries_when_every_domain_is_served(
    pair: list[np.ndarray], extra: int, seed: int
) -> None:
    """As docs/planner.md requires, every weight is worth at least one sequence per chunk."""
    num_domains = min(len(p) for p in pair)
    rng = np.random.default_rng(seed)
    num_slots = 2 * num_domains + extra
    lag = np.zeros(num_domains, np.int64)
    for turn in range(20):
        requested = pair[turn % 2][:num_domains] * rng.uniform(0.5, 1.5, num_domains)
        floored = requested / requested.sum() * (1 - num_domains * 1.01 / num_slots) + 1.01 / num_slots
        weight = quantise_weights(floored)
        _, lag = advance(lag, weight, num_slots, endless(weight))
        assert np.abs(lag).max() < UNIT


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 80), min_size=1, max_size=10),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["repeat", "redistribute", "stop"]),
    st.integers(0, 2**32),
)
def test_no_sequence_is_served_twice_or_skipped_while_domains_run_out(
    capacity: list[int], batch: int, steps: int, policy: str, seed: int
) -> None:
    planner = Planner(
        capacity=np.array(capacity, np.int64),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=steps,
        on_exhausted=policy,
    )
    requested = np.random.default_rng(seed).uniform(0.01, 1, len(capacity))
    state = PlannerState.start(len(capacity))
    served = [[] for _ in capacity]
    for _ in range(1000):
        plan, after = planner.plan(state, requested)
        slots = planner.slots(plan)
        assert len(slots.domain) == plan.num_steps * batch
        for domain, ordinal in zip(slots.domain, slots.ordinal, strict=True):
            served[domain].append(int(ordinal))
        assert after.lags.sum() == 0
        assert_same(planner.after(plan), after)
        state = after
        if plan.last:
            break
    assert plan.last
    for ordinals, available in zip(served, capacity, strict=True):
        assert ordinals == list(range(len(ordinals)))
        assert len(ordinals) <= available
    if policy == "redistribute":
        assert sum(map(len, served)) == sum(capacity) - sum(capacity) % batch


@settings(max_examples=100, deadline=None)
@given(weights(30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 10))
def test_counts_stay_exact_before_a_domain_runs_out(
    requested: np.ndarray, batch: int, steps: int, first_domain: int
) -> None:
    """A capacity has no effect before the domain is exhausted."""
    capacity = np.full(len(requested), ENDLESS)
    planner = Planner(
        capacity=capacity, batch_schedule=BatchSchedule.constant(batch), chunk_steps=steps, on_exhausted="redistribute"
    )
    plan, _ = planner.plan(PlannerState.start(len(requested)), requested)
    slots = planner.slots(plan)
    limited = capacity.copy()
    domain = first_domain % len(requested)
    limited[domain] = np.count_nonzero(slots.domain == domain) + 1
    bounded = Planner(
        capacity=limited, batch_schedule=BatchSchedule.constant(batch), chunk_steps=steps, on_exhausted="redistribute"
    )
    other, _ = bounded.plan(PlannerState.start(len(requested)), requested)
    assert np.array_equal(bounded.slots(other).domain, slots.domain)


@given(weights(20), st.integers(1, 50))
def test_a_plan_is_the_same_after_a_round_trip_through_its_buffer(requested: np.ndarray, batch: int) -> None:
    planner = Planner(
        capacity=np.full(len(requested), ENDLESS),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=3,
        on_exhausted="repeat",
    )
    plan, _ = planner.plan(PlannerState.start(len(requested)), requested)
    back = ChunkPlan.from_array(plan.to_array())
    assert np.array_equal(back.to_array(), plan.to_array())
    assert len(plan.to_array()) == ChunkPlan.array_size(len(requested))


@given(weights())
def test_quantised_weights_sum_to_one_and_keep_every_domain(requested: np.ndarray) -> None:
    weight = quantise_weights(requested)
    assert weight.sum() == UNIT
    assert (weight > 0).all()
    assert np.abs(weight / UNIT - requested / requested.sum()).max() < len(requested) * 2.0**-39


def assert_same(a: PlannerState, b: PlannerState) -> None:
    assert (a.chunk, a.step) == (b.chunk, b.step)
    assert np.array_equal(a.cursors, b.cursors)
    assert np.array_equal(a.lags, b.lags)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32))
def test_lags_carry_the_unserved_weights_from_chunk_to_chunk(
    num_domains: int, batch: int, steps: int, seed: int
) -> None:
    """With unrelated weights in every chunk, some of them 0, sequences served plus lags equal the sum of weights."""
    rng = np.random.default_rng(seed)
    planner = Planner(
        capacity=np.full(num_domains, ENDLESS),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=steps,
        on_exhausted="repeat",
    )
    state = PlannerState.start(num_domains)
    share = np.zeros(num_domains, np.int64)
    for _ in range(30):
        requested = rng.dirichlet(np.full(num_domains, rng.choice([0.05, 1.0, 50.0])))
        plan, state = planner.plan(state, requested)
        share += plan.weights * batch * steps
        assert np.array_equal(share, state.cursors * UNIT + state.lags)
        assert np.array_equal(
            np.bincount(planner.slots(plan).domain, minlength=num_domains), state.cursors - plan.cursors
        )
        assert np.abs(state.lags).max() < 2 * UNIT


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.3, 3.0)), min_size=2, max_size=12),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
def test_every_domain_serves_all_its_epochs_and_shares_stay_exact(
    domains: list[tuple[int, float]], batch: int, seed: int
) -> None:
    """With `redistribute` every domain is served to the last sequence of its epochs, and lags stay below 2."""
    items, epochs = (np.array(side) for side in zip(*domains, strict=True))
    capacity = SequenceGrid.of_samples().capacity(items, epochs)
    planner = Planner(
        capacity=capacity, batch_schedule=BatchSchedule.constant(batch), chunk_steps=3, on_exhausted="redistribute"
    )
    requested = np.random.default_rng(seed).dirichlet(np.ones(len(items)))
    state = PlannerState.start(len(items))
    last = False
    while not last:
        plan, state = planner.plan(state, requested)
        last = plan.last
        assert np.abs(state.lags).max() < 2 * UNIT
    assert capacity.sum() - batch < state.cursors.sum() <= capacity.sum()
    assert (state.cursors <= np.floor(items * epochs)).all()
