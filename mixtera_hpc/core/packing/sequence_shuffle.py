"""The order of `dataplane.shuffle=sequence`: whole sequences of the base order, permuted in every epoch.

Documents are concatenated in base order and cut into sequences; the sequences that lie in one epoch are permuted, with
a permutation of its own per domain and epoch. Price: a closed form per sequence, no memory. After samples were dropped,
what was served of the epoch is two integers per sequence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import AnyInts, LaneOrder
from mixtera_hpc.core.packing.random_permutation import permutation_keys, permute, unpermute

__all__ = ["SequenceShuffle"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceShuffle(LaneOrder):
    """An order with a single lane, whose sequences are permuted."""

    seed: int

    def sequence(self, domain: AnyInts | int, ordinal: Ints) -> Ints:
        """Return the number in the stream of the sequences that are served as number `ordinal` of their domains."""
        return self._permuted(domain, ordinal, inverse=False)

    def ordinal(self, domain: int, sequence: int) -> int:
        """Return the number under which a sequence of the stream is served; the inverse of `sequence`."""
        return int(self._permuted(domain, np.array([sequence]), inverse=True)[0])

    def served_ranges(self, domain: int, ordinal: int) -> list[tuple[int, int]]:
        """Return the items of the stream served in the segment of `ordinal` before it, as ascending ranges."""
        number = np.array([ordinal])
        low, _ = self._bounds(domain, number)
        first = int(self.whole_sequences(domain, number)[0][0])
        served = np.sort(self.sequence(domain, np.arange(first, ordinal)))
        origin = int(self.origins[domain])
        # The last sequence of the epoch before may end behind the border.
        begins = [(int(low[0]), origin + first * self.grid.stride)]
        items = (origin + served * self.grid.stride).tolist()
        return begins + [(item, item + self.grid.stride) for item in items]

    def _permuted(self, domain: AnyInts | int, number: Ints, *, inverse: bool) -> Ints:
        """Permute the sequences of each segment; those that end in the next epoch keep their place."""
        first, count = self.whole_sequences(domain, number)
        result = number.copy()
        chosen = np.flatnonzero((number >= first) & (number - first < count))
        if not len(chosen):
            return result
        domains = np.broadcast_to(np.asarray(domain, np.int64), number.shape)[chosen]
        first = first[chosen]
        epoch = (self.origins[domains] + first * self.grid.stride) // self.epoch_items[domains]
        keys = permutation_keys(self.seed, domains, epoch)
        move = unpermute if inverse else permute
        result[chosen] = first + move(number[chosen] - first, count[chosen], keys)
        return result
