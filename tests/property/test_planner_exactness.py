"""Promise 1: every prefix of the served order keeps every domain within 1 sequence of its share."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.apportion import UNIT, advance, order, quantise
from mixtera_hpc.core.planner import ChunkPlan, Planner, PlannerState

ENDLESS = 1 << 61


@st.composite
def weights(draw: st.DrawFn, max_domains: int = 60) -> np.ndarray:
    """Groups of equal weights on scales from 1 to 1e-9: ties and long tails are what breaks apportionment."""
    groups = draw(st.lists(st.tuples(st.integers(1, max_domains // 3), st.floats(-9, 0)), min_size=1, max_size=4))
    jitter = draw(st.sampled_from([0.0, 0.01, 0.5]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    flat = np.concatenate([np.full(count, 10.0**exponent) for count, exponent in groups])
    return flat * rng.uniform(1 - jitter, 1 + jitter, len(flat))


def largest_deviation(lag: np.ndarray, weight: np.ndarray, served: np.ndarray) -> int:
    """In units of 2^-40 sequence, over every prefix."""
    counts = np.cumsum(np.eye(len(weight), dtype=np.int64)[served], axis=0)
    share = lag + weight * np.arange(1, len(served) + 1)[:, None]
    return int(np.abs(share - counts * UNIT).max(initial=0))


@settings(max_examples=300, deadline=None)
@given(weights(), st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_every_prefix_is_exact_whatever_the_chunk_sizes(wish: np.ndarray, chunks: list[int]) -> None:
    weight = quantise(wish)
    lag = np.zeros(len(weight), np.int64)
    endless = np.full(len(weight), ENDLESS)
    for num_slots in chunks:
        counts = advance(lag, weight, num_slots, endless)
        assert counts.sum() == num_slots
        served = order(lag, weight, counts)
        assert np.array_equal(np.bincount(served, minlength=len(weight)), counts)
        assert largest_deviation(lag, weight, served) < UNIT
        lag = lag + weight * num_slots - counts * UNIT


def test_two_thousand_domains_with_weights_down_to_1e_9_stay_exact() -> None:
    rng = np.random.default_rng(7)
    weight = quantise(10.0 ** rng.uniform(-9, 0, 2000))
    lag = np.zeros(2000, np.int64)
    for num_slots in (1, 17, 3000, 64, 5000):
        counts = advance(lag, weight, num_slots, np.full(2000, ENDLESS))
        assert largest_deviation(lag, weight, order(lag, weight, counts)) < UNIT
        lag = lag + weight * num_slots - counts * UNIT


@settings(max_examples=100, deadline=None)
@given(st.lists(weights(30), min_size=2, max_size=2), st.integers(1, 64), st.integers(0, 2**32))
def test_changing_weights_stay_exact_at_chunk_boundaries_when_every_domain_is_served(
    pair: list[np.ndarray], extra: int, seed: int
) -> None:
    """The condition of docs/planner.md: every weight is worth at least one sequence a chunk."""
    num_domains = min(len(p) for p in pair)
    rng = np.random.default_rng(seed)
    num_slots = 2 * num_domains + extra
    lag = np.zeros(num_domains, np.int64)
    for turn in range(20):
        wish = pair[turn % 2][:num_domains] * rng.uniform(0.5, 1.5, num_domains)
        floored = wish / wish.sum() * (1 - num_domains * 1.01 / num_slots) + 1.01 / num_slots
        weight = quantise(floored)
        counts = advance(lag, weight, num_slots, np.full(num_domains, ENDLESS))
        lag = lag + weight * num_slots - counts * UNIT
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
        capacity=np.array(capacity, np.int64), global_batch_size=batch, chunk_steps=steps, on_exhausted=policy
    )
    wish = np.random.default_rng(seed).uniform(0.01, 1, len(capacity))
    state, served = PlannerState.start(len(capacity)), [[] for _ in capacity]
    for _ in range(1000):
        plan, after = planner.plan(state, wish)
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
    wish: np.ndarray, batch: int, steps: int, first_domain: int
) -> None:
    """Until the first exhaustion a bounded domain changes nothing."""
    capacity = np.full(len(wish), ENDLESS)
    planner = Planner(capacity=capacity, global_batch_size=batch, chunk_steps=steps, on_exhausted="redistribute")
    plan, _ = planner.plan(PlannerState.start(len(wish)), wish)
    slots = planner.slots(plan)
    limited = capacity.copy()
    domain = first_domain % len(wish)
    limited[domain] = np.count_nonzero(slots.domain == domain) + 1
    bounded = Planner(capacity=limited, global_batch_size=batch, chunk_steps=steps, on_exhausted="redistribute")
    other, _ = bounded.plan(PlannerState.start(len(wish)), wish)
    assert np.array_equal(bounded.slots(other).domain, slots.domain)


@given(weights(20), st.integers(1, 50))
def test_a_plan_survives_its_way_through_a_buffer(wish: np.ndarray, batch: int) -> None:
    planner = Planner(
        capacity=np.full(len(wish), ENDLESS), global_batch_size=batch, chunk_steps=3, on_exhausted="repeat"
    )
    plan, _ = planner.plan(PlannerState.start(len(wish)), wish)
    back = ChunkPlan.from_array(plan.to_array())
    assert np.array_equal(back.to_array(), plan.to_array())
    assert len(plan.to_array()) == ChunkPlan.array_size(len(wish))


@given(weights())
def test_quantised_weights_sum_to_one_and_keep_every_domain(wish: np.ndarray) -> None:
    weight = quantise(wish)
    assert weight.sum() == UNIT
    assert (weight > 0).all()
    assert np.abs(weight / UNIT - wish / wish.sum()).max() < len(wish) * 2.0**-39


def assert_same(a: PlannerState, b: PlannerState) -> None:
    assert (a.chunk, a.step) == (b.chunk, b.step)
    assert np.array_equal(a.cursors, b.cursors)
    assert np.array_equal(a.lags, b.lags)
