"""The order of a domain's stream: blocks permuted every epoch, rows permuted inside windows of permuted blocks.

Nothing about a permutation is stored. It is a stable sort of counter-based random words (Philox, Salmon et al. 2011) keyed by
(seed, domain) and counted by (epoch, window), so any position of any epoch is reached by one O(blocks) pass over the
domain's blocks and a binary search. Only raw Philox words are used: their stream is fixed, unlike that of
`Generator.permutation`, which may change between numpy releases.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochOrder", "Shuffle", "ShuffleOrder"]

Shuffle = Literal["none", "block", "window"]
Ints = NDArray[np.int64]

_BLOCKS, _ROWS = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The blocks of one domain in one epoch, cut into windows."""

    block_order: Ints
    """Positions in the domain's block list; shape (num_blocks,)."""
    window_blocks: int
    """Blocks per window; the last window may have fewer."""
    starts: Ints
    """First item of every window, and the epoch's number of items at the end; shape (num_windows + 1,)."""

    def window_at(self, item: int) -> int:
        """The window that holds `item` of the epoch; O(log windows)."""
        return int(np.searchsorted(self.starts, item, side="right")) - 1

    def blocks_of(self, window: int) -> Ints:
        """The window's blocks, in order, as positions in the domain's block list."""
        first = window * self.window_blocks
        return self.block_order[first : first + self.window_blocks]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffleOrder:
    """How streams are shuffled."""

    seed: int
    shuffle: Shuffle
    window: int
    """Blocks whose rows are shuffled together, with `shuffle="window"`."""

    def epoch(self, domain: int, epoch: int, sizes: Ints) -> EpochOrder:
        """Order the blocks of `domain`, which hold `sizes` items each, for `epoch`. O(blocks)."""
        if self.shuffle == "none":
            block_order = np.arange(len(sizes))
        else:
            block_order = _permutation(self._words(domain, epoch, 0, _BLOCKS, len(sizes)))
        window_blocks = self.window if self.shuffle == "window" else 1
        ends = np.cumsum(sizes[block_order])
        last = np.arange(window_blocks, len(sizes) + window_blocks, window_blocks)
        starts = np.concatenate([[0], ends[np.minimum(last, len(sizes)) - 1]]) if len(sizes) else np.zeros(1, np.int64)
        return EpochOrder(block_order=block_order, window_blocks=window_blocks, starts=starts)

    def rows(self, domain: int, epoch: int, window: int, num_rows: int) -> Ints:
        """The order of a window's rows; a permutation of shape (num_rows,)."""
        if self.shuffle != "window":
            return np.arange(num_rows)
        return _permutation(self._words(domain, epoch, window, _ROWS, num_rows))

    def _words(self, domain: int, epoch: int, window: int, purpose: int, num_words: int) -> NDArray[np.uint64]:
        key = np.array([self.seed, domain], np.uint64)
        counter = np.array([0, window, epoch, purpose], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(num_words)


def _permutation(words: NDArray[np.uint64]) -> Ints:
    return np.argsort(words, kind="stable")
