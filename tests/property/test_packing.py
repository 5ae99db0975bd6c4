"""Packing, balancing and shuffled sequences: the same tokens, any number of ranks, any restart."""

from collections import Counter
from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.packing.balance import attention_costs, balanced_order, max_over_mean
from mixtera_hpc.core.packing.best_fit import concatenate, count_cut, pack_best_fit
from mixtera_hpc.core.packing.micro_batches import fill_micro_batches
from mixtera_hpc.core.packing.random_permutation import permutation_keys, permute, unpermute
from mixtera_hpc.core.packing.sequence_shuffle import SequenceShuffle
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.packing.balanced_positions import slot_costs
from mixtera_hpc.dataplane.reading.packing.sample_costs import SampleCosts
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.step_sequences import ChunkSteps, planned_slots, slots_of_plan
from mixtera_hpc.dataplane.resume.cut_streams import cut_streams
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import ConfigError

from .examples import whole_runs

Ints = NDArray[np.int64]
FEW = whole_runs(40)
GROUPS = st.tuples(st.integers(1, 40), st.integers(0, 1), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.sets(st.integers(1, max(shape[0] * shape[2] + shape[1] - 1, 1)), max_size=40)
    )
)
"""(stride, overlap, sequences), and where documents end."""


def lengths_of(group: tuple[tuple[int, int, int], set[int]]) -> Ints:
    (stride, overlap, count), cuts = group
    total = stride * count + overlap
    return np.diff([0, *sorted(cut for cut in cuts if cut < total), total])


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_a_permutation_has_every_value_once_and_an_inverse(size: int, seed: int, number: int) -> None:
    values = np.arange(size)
    sizes = np.full(size, size)
    keys = permutation_keys(seed, np.full(size, number))
    places = permute(values, sizes, keys)
    assert np.array_equal(np.sort(places), values)
    assert np.array_equal(unpermute(places, sizes, keys), values)


def test_permutations_of_four_are_equally_frequent() -> None:
    keys = [permutation_keys(3, np.full(4, number)) for number in range(4800)]
    counts = Counter(tuple(permute(np.arange(4), np.full(4, 4), key).tolist()) for key in keys)
    assert len(counts) == 24
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.booleans(),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.integers(0, 400),
    st.integers(0, 3),
)
def test_shuffled_sequences_stay_in_their_epoch(
    seq_len: int, overlap: bool, items: list[int], begin: int, seed: int
) -> None:
    grid = SequenceGrid.of_tokens(seq_len, overlap)
    begins = np.minimum(begin, np.array(items))
    order = SequenceShuffle(
        lanes=1, grid=grid, epoch_items=np.array(items), origins=begins.copy(), begins=begins, seed=seed
    )
    for domain in range(len(items)):
        # The sequences that begin in four epochs.
        ordinals = np.arange(-((begins[domain] - 4 * items[domain]) // grid.stride))
        sequences = order.sequence(domain, ordinals)
        assert np.array_equal(np.sort(sequences), ordinals)
        starts = begins[domain] + ordinals * grid.stride
        moved = begins[domain] + sequences * grid.stride
        assert np.array_equal(starts // items[domain], moved // items[domain])
        assert [order.ordinal(domain, int(sequence)) for sequence in sequences] == ordinals.tolist()


@given(GROUPS)
@example(((35, 1, 8), {248, 245}))
def test_a_packed_group_has_the_same_tokens_and_cuts_fewer_documents(
    group: tuple[tuple[int, int, int], set[int]],
) -> None:
    (stride, overlap, count), _ = group
    lengths = lengths_of(group)
    packed = pack_best_fit(lengths, stride, overlap)
    tokens = [
        (document, token)
        for document, first, last in zip(packed.document, packed.first, packed.last, strict=True)
        for token in range(first, last)
    ]
    assert sorted(tokens) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    # The tokens that groups share with their neighbours stay where they are.
    assert tokens[0] == (0, 0)
    assert tokens[-1] == (len(lengths) - 1, lengths[-1] - 1)

    is_cut = count_cut(packed, len(lengths), stride, stride + overlap)
    for document in range(len(lengths)):
        places = [place for place, (own, _) in enumerate(tokens) if own == document]
        in_one_sequence = any(k * stride <= places[0] and places[-1] < (k + 1) * stride + overlap for k in range(count))
        # Two parts may lie side by side around the token that two sequences share, the later one first.
        in_order = [tokens[place][1] for place in places] == list(range(lengths[document]))
        is_whole = in_one_sequence and in_order and places[-1] - places[0] + 1 == len(places)
        assert is_cut[document] != is_whole


def test_best_fit_cuts_a_fraction_of_the_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6.0, 1.0, 2000).astype(np.int64))
    ends = np.cumsum(lengths)
    lengths = np.diff(np.append(0, np.append(ends[ends < 64 * 4096], 64 * 4096 + 1)))
    orders = (concatenate(lengths), pack_best_fit(lengths, 4096, 1))
    concatenated, packed = (int(count_cut(order, len(lengths), 4096, 4097).sum()) for order in orders)
    assert packed < concatenated / 5


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60))
def test_a_balanced_order_is_a_permutation(costs: list[int]) -> None:
    order = balanced_order(np.array([costs, costs[::-1]]))
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(len(costs)), (2, 1)))


def test_any_number_of_ranks_is_balanced() -> None:
    rng = np.random.default_rng(1)
    costs = rng.integers(1, 1000, (20, 48))
    balanced = np.take_along_axis(costs, balanced_order(costs), axis=1)
    for ranks in (2, 3, 4, 6, 8):
        assert max_over_mean(balanced, ranks) - 1 < (max_over_mean(costs, ranks) - 1) / 4


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    return compose_plain([*collection, "dataplane.global_batch_size=12", "dataplane.seq_len=48"])


def source_of(plain: dict[str, Any], drop: tuple[str, ...] = (), **plane: object) -> Source:
    mixture = {"on_exhausted": "redistribute", "max_epochs": 1.0}
    changed = {**plain, "mixture": plain["mixture"] | mixture, "dataplane": plain["dataplane"] | plane}
    return open_source(from_plain(Config, changed), Local(), subset=SampleSubset(drop=drop))


Item = tuple[int, int, int]
"""Block, row and token."""


def items_of(source: Source, domain: int, ordinals: Ints) -> list[list[Item]]:
    """Return the items of every served sequence."""
    documents = SequenceDocuments(source, source.streams())
    found = []
    for number in source.lanes.sequence(domain, ordinals).tolist():
        own = documents.documents(np.array([domain]), np.array([number]))
        columns = zip(own.block.tolist(), own.row.tolist(), own.first.tolist(), own.last.tolist(), strict=True)
        found.append([(b, r, token) for b, r, first, last in columns for token in range(first, last)])
    return found


@FEW
@given(st.booleans(), st.integers(2, 9), st.sampled_from(["none", "block", "window"]), st.integers(0, 4))
def test_a_group_of_sequences_has_the_tokens_that_it_has_without_packing(
    plain: dict[str, Any], overlap: bool, group: int, shuffle: str, domain: int
) -> None:
    plane = {"shuffle": shuffle, "lanes": 1, "overlap_one_token": overlap, "pack_group": group}
    packed = source_of(plain, pack="best_fit", **plane)
    concat = source_of(plain, **plane)
    capacity = int(packed.planner.capacity[domain])
    ours = items_of(packed, domain, np.arange(capacity))
    theirs = items_of(concat, domain, np.arange(capacity))
    assert {len(items) for items in ours} <= {packed.grid.length}
    borders = [*range(0, capacity, group), capacity]
    for first, stop in pairwise(borders):
        # Without the token that two sequences share, which may be another one inside the group.
        mine, other = (
            [i for items in all_[first:stop] for i in items[: packed.grid.stride]] for all_ in (ours, theirs)
        )
        assert Counter(mine) == Counter(other)
        assert ours[first][0] == theirs[first][0] and ours[stop - 1][-1] == theirs[stop - 1][-1]


@FEW
@given(
    st.sampled_from([1, 2, 16]),
    st.integers(2, 9),
    st.integers(0, 60),
    st.sampled_from([("size < 300",), ("'def' in tags",)]),
    st.sampled_from([{"pack": "best_fit"}, {"shuffle": "sequence"}]),
)
def test_after_a_drop_inside_a_group_every_token_left_is_served_once(
    plain: dict[str, Any], lanes: int, group: int, served: int, drop: tuple[str, ...], order: dict[str, str]
) -> None:
    plane = {"lanes": lanes, "pack_group": group, "overlap_one_token": False, **order}
    before = source_of(plain, **plane)
    whole = source_of(plain, drop, **plane)
    cursors = np.minimum(served, before.planner.capacity)
    start = StreamVersion.start(before.num_domains)
    after = whole.at_version(cut_streams(start, before, whole, cursors, cursors))
    for domain in range(before.num_domains):
        first = flat(items_of(before, domain, np.arange(cursors[domain])))
        later = flat(items_of(after, domain, np.arange(cursors[domain], after.planner.capacity[domain])))
        assert len(set(later)) == len(later)
        assert not set(later) & set(first)
        # What does not fill a sequence at the end of the epoch is not served.
        tail = epoch_of(whole, domain) - set(first) - set(later)
        assert len(tail) < after.grid.length
        assert not set(later) - epoch_of(whole, domain)


def flat(items: list[list[Item]]) -> list[Item]:
    return [item for own in items for item in own]


def epoch_of(source: Source, domain: int) -> set[Item]:
    """Return the items of one epoch of a domain."""
    num_items = int(source.layout.epoch_items()[domain])
    if not num_items:
        return set()
    own = source.streams().documents(domain, 0, num_items)
    return {
        (block, row, token)
        for block, row, size in zip(own.block.tolist(), own.row.tolist(), own.size.tolist(), strict=True)
        for token in range(size)
    }


@FEW
@given(st.sampled_from(["concat", "best_fit"]), st.sampled_from([2, 3, 4, 6, 12]), st.integers(0, 3))
def test_balancing_changes_only_the_positions_inside_a_group(
    plain: dict[str, Any], pack: str, group: int, seed: int
) -> None:
    plain_source = source_of(plain, pack=pack, seed=seed)
    balanced = source_of(plain, pack=pack, seed=seed, balance="attention", balance_group=group)
    plan, _ = plain_source.planner.plan(PlannerState.start(plain_source.num_domains), plain_source.weights)
    slots = [slots_of_plan(source, plan) for source in (plain_source, balanced)]
    pairs = [list(zip(s.domain.tolist(), s.ordinal.tolist(), strict=True)) for s in slots]
    for first in range(0, len(pairs[0]), group):
        assert sorted(pairs[0][first : first + group]) == sorted(pairs[1][first : first + group])
    documents = SequenceDocuments(balanced, balanced.streams())
    costs = [slot_costs(balanced, documents, [s])[0].reshape(-1, group) for s in slots]
    ranks = 3 if group % 3 == 0 else 2
    # Each group is divided once for this number of ranks, by a heuristic.
    assert max_over_mean(costs[1], ranks) <= max_over_mean(costs[0], ranks) * 1.02


def test_steps_that_do_not_follow_each_other_have_the_sequences_that_they_have_in_the_chunk(
    plain: dict[str, Any],
) -> None:
    """Forecasts leave out steps of another size."""
    source = source_of(plain, lanes=3)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    order = source.planner.order(plan)
    steps = range(plan.first_step, plan.first_step + plan.num_steps)
    assert len(steps) > 2
    whole = slice(0, source.batch_size_of(0))
    some, every = (
        planned_slots(source, [ChunkSteps(order, plan.first_step, chosen)], [whole] * len(chosen)).steps()
        for chosen in (steps[::2], steps)
    )
    for one, other in zip(some, every[::2], strict=True):
        assert one.domain.tolist() == other.domain.tolist()
        assert one.ordinal.tolist() == other.ordinal.tolist()


def test_the_loss_of_a_part_behind_another_document_does_not_count(plain: dict[str, Any]) -> None:
    source = source_of(plain, pack="best_fit", seq_len=32)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        batches = list(maker.batches(plan, 0))
    for batch in batches:
        assert np.array_equal(batch.loss_mask, np.diff(batch.document_ids, axis=1) == 0)


def test_attention_costs_are_sums_of_squares() -> None:
    assert attention_costs(np.array([3, 4, 2, 9]), np.array([0, 0, 1, 1]), 3).tolist() == [25, 85, 0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=24), st.sampled_from([1, 2, 3, 4, 6]), st.integers(50, 120))
def test_micro_batches_hold_every_row_once_within_the_budget(costs: list[int], ranks: int, budget: int) -> None:
    size = -(-len(costs) // ranks)
    padded = np.zeros(size * ranks)
    padded[: len(costs)] = costs
    by_rank = [fill_micro_batches(padded, size, rank * size, float(budget)) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in by_rank}) == 1
    for rank, of_rank in enumerate(by_rank):
        rows = [row for part in of_rank for row in range(size)[part]]
        assert rows == list(range(size))
        sums = [padded[rank * size :][:size][part].sum() for part in of_rank]
        assert max(sums) <= budget
        # Neighbours do not fit into one, so there are not more than needed.
        needed = [total for total, part in zip(sums, of_rank, strict=True) if part.start < part.stop]
        assert all(a + b > budget for a, b in pairwise(needed)) or len(needed) == 1 or 0.0 in needed


SAMPLES = {"unit": "samples", "on_exhausted": "redistribute", "max_epochs": 1.0}


def sample_source(plain: dict[str, Any], **plane: object) -> Source:
    changed = {**plain, "mixture": plain["mixture"] | SAMPLES, "dataplane": plain["dataplane"] | plane}
    return open_source(from_plain(Config, changed), Local())


@FEW
@given(
    st.sampled_from(["none", "cost"]),
    st.sampled_from([600.0, 1000.0, 5000.0]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(["window", "sequence"]),
)
def test_ranks_get_the_same_number_of_micro_batches_of_the_samples_of_a_step(
    plain: dict[str, Any], balance: str, budget: float, ranks: int, shuffle: str
) -> None:
    settings_ = {"sample_cost": "tokens", "balance": balance, "shuffle": shuffle, "last_batch": "pad"}
    changed = {**plain, "query": plain["query"] | {"where": "tokens <= 600"}}
    source = sample_source(changed, sample_budget=budget, **settings_)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)

    def batches(rank: int, num_ranks: int) -> list[Batch]:
        part = BatchSlice(group=rank, num_groups=num_ranks)
        with closing(BatchMaker(source, part, audit=True)) as maker:
            return list(maker.batches(plan, 0))

    whole = batches(0, 1)
    parts = [batches(rank, ranks) for rank in range(ranks)]
    documents = SequenceDocuments(source, source.streams())
    [costs] = slot_costs(source, documents, [slots_of_plan(source, plan, documents)])
    for step, of_ranks in enumerate(zip(*parts, strict=True)):
        assert [digest for batch in of_ranks for digest in batch.digests or []] == whole[step].digests
        assert len({len(batch.micro_batches) for batch in of_ranks}) == 1
        for batch in of_ranks:
            own = costs[12 * step + batch.positions[0] :][: len(batch.positions)]
            assert max(own[rows].sum() for rows in batch.micro_batches) <= budget
            assert [row for rows in batch.micro_batches for row in range(12 // ranks)[rows]] == [*range(12 // ranks)]


def test_a_sample_above_the_budget_is_refused_before_the_first_step(plain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'query\.where="tokens >= 0 and tokens <= 20"'):
        sample_source(plain, sample_cost="tokens", sample_budget=20.0)
    with pytest.raises(ConfigError, match="have no size"):
        sample_source(plain, sample_cost="size")
    with pytest.raises(ConfigError, match="not a number property"):
        sample_source(plain, sample_cost="source")


def test_only_samples_that_are_served_need_a_cost_within_the_budget(plain: dict[str, Any]) -> None:
    def limited(names: list[str], fraction: float) -> dict[str, Any]:
        domains = [{"key": {"source": name}, "fraction": fraction} for name in names]
        return {**plain, "mixture": plain["mixture"] | {"domains": domains, "group_by": []}}

    def largest(config: dict[str, Any]) -> float:
        source = sample_source(config, sample_cost="tokens")
        streams = source.streams()
        items = source.layout.epoch_items().tolist()
        epochs = [streams.documents(domain, 0, count) for domain, count in enumerate(items) if count]
        return max(float(SampleCosts(source).of_documents(documents).max()) for documents in epochs)

    names = [key["source"] for key in sample_source(plain).index.domain_keys[:3]]
    budgets = [largest(config) for config in (limited(names, 0.2), limited(names, 1.0), plain)]
    assert budgets == sorted(set(budgets))
    sample_source(limited(names, 0.2), sample_cost="tokens", sample_budget=budgets[0])
    with pytest.raises(ConfigError, match="sample_budget"):
        sample_source(limited(names, 1.0), sample_cost="tokens", sample_budget=budgets[0])
    sample_source(limited(names, 1.0), sample_cost="tokens", sample_budget=budgets[1])
    with pytest.raises(ConfigError, match="sample_budget"):
        sample_source(plain, sample_cost="tokens", sample_budget=budgets[1])
