"""Lanes permute the sequences of an epoch, and a rank needs few of them."""

import tracemalloc
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.lanes import LaneOrder, ServedPart, cut_spans
from mixtera_hpc.core.sequence_grid import SequenceGrid

GRIDS = st.one_of(
    st.just(SequenceGrid.of_samples()), st.builds(SequenceGrid.of_tokens, st.integers(1, 40), st.booleans())
)
LANES = st.sampled_from([1, 2, 3, 7, 16, 500])


def lane_order(lanes: int, grid: SequenceGrid, items: int, origin: int = 0, begin: int = 0) -> LaneOrder:
    values = (np.array([value]) for value in (items, origin, begin))
    epoch_items, origins, begins = values
    return LaneOrder(lanes=lanes, grid=grid, epoch_items=epoch_items, origins=origins, begins=begins)


@given(LANES, GRIDS, st.integers(1, 3000), st.integers(0, 400), st.integers(-50, 50))
def test_every_sequence_is_served_once_and_stays_in_its_epoch(
    lanes: int, grid: SequenceGrid, items: int, cursor: int, shift: int
) -> None:
    """Also after a drop, when the stream continues at `begin` with sequence `cursor`."""
    begin = cursor * grid.stride + shift if cursor else 0
    begin = max(begin, 0)
    order = lane_order(lanes, grid, items, origin=begin - cursor * grid.stride, begin=begin)
    first_after_epochs = -(-(3 * items + begin) // grid.stride)
    ordinals = np.arange(cursor, cursor + first_after_epochs)
    sequences = order.sequence(0, ordinals)
    starts = order.origins[0] + ordinals * grid.stride
    served_starts = order.origins[0] + sequences * grid.stride
    assert (served_starts // items == starts // items).all()
    assert (served_starts >= begin).all()
    whole = ordinals[starts // items < (starts.max() // items)]
    assert sorted(sequences[: len(whole)].tolist()) == whole.tolist()
    assert [order.ordinal(0, int(sequence)) for sequence in sequences[:50]] == ordinals[:50].tolist()


@given(LANES, GRIDS, st.integers(1, 3000), st.integers(0, 300))
def test_the_served_ranges_cover_exactly_the_sequences_served_so_far(
    lanes: int, grid: SequenceGrid, items: int, count: int
) -> None:
    order = lane_order(lanes, grid, items)
    epoch = count * grid.stride // items
    items_served = np.zeros((epoch + 2) * items + grid.length, np.int64)
    for sequence in order.sequence(0, np.arange(count)).tolist():
        items_served[sequence * grid.stride : (sequence + 1) * grid.stride] = 1
    expected = np.zeros_like(items_served)
    for first, last in order.served_ranges(0, count):
        expected[first:last] += 1
    of_epoch = slice(epoch * items, (epoch + 1) * items)
    assert np.array_equal(items_served[of_epoch], expected[of_epoch])


@given(st.sampled_from([2, 4, 8, 16]), st.integers(1, 8), st.integers(0, 500))
def test_a_rank_needs_its_share_of_the_lanes_and_one_more(lanes: int, per_lane: int, first: int) -> None:
    """Ranks as many as lanes."""
    step_size = 2 * per_lane * lanes
    order = lane_order(lanes, SequenceGrid.of_samples(), 3000)
    slots = order.positions(np.array([[first]]), np.array([[first + step_size]]), [slice(0, step_size)]).together
    assert sorted(slots.ordinal.tolist()) == list(range(first, first + step_size))
    lane = np.array([lane_of(order, 0, ordinal) for ordinal in slots.ordinal.tolist()])
    assert all(len(np.unique(of_rank)) <= 2 for of_rank in lane.reshape(lanes, -1))


DOMAINS = st.lists(
    st.tuples(st.integers(1, 900), st.integers(0, 60), st.integers(0, 40), st.integers(0, 50)), min_size=1, max_size=9
)


def lane_of(order: LaneOrder, domain: int, ordinal: int) -> int:
    """Return the lane of a served sequence, from the sequence of the stream that it is."""
    epoch = order._epoch_lanes(domain, np.array([ordinal]))
    first, length = int(epoch.first[0]), int(epoch.lane_length[0])
    number = int(order.sequence(domain, np.array([ordinal]))[0]) - first
    return number // length if 0 <= number < order.lanes * length else order.lanes - 1


@settings(max_examples=300)
@given(LANES, GRIDS, DOMAINS, st.lists(st.integers(0, 400), max_size=5))
def test_any_positions_of_a_step_are_those_of_all_its_sequences_sorted_by_lane(
    lanes: int, grid: SequenceGrid, domains: list[tuple[int, int, int, int]], borders: list[int]
) -> None:
    """Whatever the ranks: over the ends of epochs, after drops, and for domains of fewer sequences than lanes."""
    items, first, count, begin = (np.array(column, np.int64) for column in zip(*domains, strict=True))
    # After a drop, sequence `first` begins at `begin` or up to one stride behind it.
    begins = np.where(begin > 0, first * grid.stride + begin, 0)
    origins = np.where(begin > 0, begins - first * grid.stride + begin % grid.stride, 0)
    order = LaneOrder(lanes=lanes, grid=grid, epoch_items=items, origins=origins, begins=begins)

    domain = np.repeat(np.arange(len(items)), count)
    ordinal = np.concatenate([np.arange(start, start + size) for start, size in zip(first, count, strict=True)])
    lane = np.array([lane_of(order, *of) for of in zip(domain.tolist(), ordinal.tolist(), strict=True)], np.int64)
    # Sorted by lane, and rotated by half a lane.
    chosen = np.roll(np.argsort(lane, kind="stable"), -(len(lane) // (2 * lanes)))
    ends = sorted({0, *borders, len(domain)})
    for start, stop in pairwise(ends):
        # The step before has nothing, and the one behind nothing of the first domain.
        last = first + count
        behind = np.concatenate([last[:1], last[1:] + count[1:]])
        none, part, _ = order.positions(
            np.stack([first, first, last]), np.stack([first, last, behind]), [slice(start, stop)] * 3
        ).steps()
        assert not len(none.domain)
        assert part.domain.tolist() == domain[chosen][start:stop].tolist()
        assert part.ordinal.tolist() == ordinal[chosen][start:stop].tolist()
        assert part.sequence is not None
        assert part.sequence.tolist() == order.sequence(part.domain, part.ordinal).tolist()


def test_thousands_of_epochs_in_a_thousand_steps_take_little_memory() -> None:
    size = 256
    order = lane_order(lanes=16, grid=SequenceGrid.of_samples(), items=20)
    borders = np.arange(0, 1001 * size, size)[:, None]
    tracemalloc.start()
    try:
        together = order.positions(borders[:-1], borders[1:], [slice(0, size)] * 1000).together
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.sort(together.ordinal), np.arange(1000 * size))
    assert np.array_equal(together.ordinal // size, np.repeat(np.arange(1000), size))
    assert peak < 100 << 20


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 60)), min_size=1), st.lists(st.integers(1, 159)))
def test_cut_spans_keeps_every_item_in_order(spans: list[tuple[int, int]], inner: list[int]) -> None:
    borders = np.array([0, *sorted(inner), 160])
    starts = np.array([start for start, _ in spans])
    stops = starts + np.array([length for _, length in spans])
    begins, ends, cells = cut_spans(starts, stops, borders)
    items = [item for start, stop in zip(starts, stops, strict=True) for item in range(start, stop)]
    assert [item for begin, end in zip(begins, ends, strict=True) for item in range(begin, end)] == items
    assert (borders[cells] <= begins).all() and (ends <= borders[cells + 1]).all()


def test_an_epoch_continues_after_a_drop_with_what_was_not_served() -> None:
    part = ServedPart(epoch=3, ranges=((0, 4), (10, 15)))
    assert part.pieces(20).tolist() == [[0, 4], [10, 15], [4, 10], [15, 20]]
