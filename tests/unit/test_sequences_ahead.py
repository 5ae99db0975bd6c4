"""Sequences that are permuted ahead are those that are permuted when they are served."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.core.packing.sequence_shuffle import SequenceShuffle
from mixtera_hpc.core.packing.sequences_ahead import MAX_NUMBERS, MIN_OF_DOMAIN, PAUSE, SequencesAhead
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.core.slots.segment_order import Slots

NUM_DOMAINS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountedShuffle(SequenceShuffle):
    """An order that counts how often it permutes."""

    calls: list[int] = field(default_factory=list)

    def sequence(self, domain: NDArray[np.integer], ordinal: NDArray[np.int64]) -> NDArray[np.int64]:
        self.calls.append(len(ordinal))
        # Python's `super()` does not know the class that replaces one with slots.
        return SequenceShuffle.sequence(self, domain, ordinal)


def shuffle(cls: type[SequenceShuffle]) -> SequenceShuffle:
    return cls(
        lanes=1,
        grid=SequenceGrid.of_tokens(16, overlap=True),
        epoch_items=np.array([1000, 5000, 90, 20_000, 7000]),
        origins=np.array([0, 3, 0, 11, 0]),
        begins=np.zeros(NUM_DOMAINS, np.int64),
        seed=4,
    )


def check(cursor: NDArray[np.int64], counts: NDArray[np.int64], ahead: SequencesAhead, lanes: SequenceShuffle) -> None:
    """Ask for `counts[k]` sequences of domain k, from `cursor[k]` on and in any order."""
    random = np.random.default_rng(int(cursor.sum()))
    domain = random.permutation(np.repeat(np.arange(NUM_DOMAINS, dtype=np.int32), counts))
    ordinal = np.zeros(len(domain), np.int64)
    for number in range(NUM_DOMAINS):
        ordinal[domain == number] = cursor[number] + np.arange(counts[number])
    sequence = ahead.sequences(Slots(domain=domain, ordinal=ordinal))
    assert np.array_equal(sequence, lanes.sequence(domain, ordinal))
    cursor += counts


def test_a_run_permutes_several_chunks_in_one_call() -> None:
    counted = shuffle(CountedShuffle)
    ahead = SequencesAhead(counted)
    cursor = np.array([0, 7, 0, 400, 9])
    for number in range(60):
        # Counts vary by one, and domains stay away from a chunk.
        counts = np.array([30 + number % 2, 60, (number + 1) % 2, 11, 0 if number < 3 else 5])
        check(cursor, counts, ahead, shuffle(SequenceShuffle))
    assert len(counted.calls) < 20


def test_calls_that_do_not_follow_each_other_permute_their_own_sequences() -> None:
    counted = shuffle(CountedShuffle)
    ahead = SequencesAhead(counted)
    random = np.random.default_rng(1)
    for _ in range(PAUSE):
        cursor = random.integers(0, 10**6, NUM_DOMAINS)
        check(cursor, np.array([9, 20, 0, 1, 3]), ahead, shuffle(SequenceShuffle))
    # That of the first call was of no use, so there is no other for a while.
    assert [size for size in counted.calls if size > 33] == [8 * (9 + 20 + 3) + MIN_OF_DOMAIN]


@pytest.mark.parametrize("count", [MAX_NUMBERS // 4, MAX_NUMBERS])
def test_large_calls_permute_their_own_sequences(count: int) -> None:
    counted = shuffle(CountedShuffle)
    ahead = SequencesAhead(counted)
    cursor = np.zeros(NUM_DOMAINS, np.int64)
    for _ in range(6):
        check(cursor, np.array([0, count, 0, 0, 7]), ahead, shuffle(SequenceShuffle))
    assert max(counted.calls) <= max(MAX_NUMBERS, count + 7)


def test_sequences_of_past_domains_make_room() -> None:
    """A mixture whose domains change, such as that of a schedule, is permuted ahead in all of its stages."""
    counted = shuffle(CountedShuffle)
    ahead = SequencesAhead(counted)
    cursor = np.zeros(NUM_DOMAINS, np.int64)
    for domain in range(NUM_DOMAINS):
        counted.calls.clear()
        counts = np.zeros(NUM_DOMAINS, np.int64)
        counts[domain] = MAX_NUMBERS // 8
        for _ in range(16):
            check(cursor, counts, ahead, shuffle(SequenceShuffle))
        assert len(counted.calls) == 2
