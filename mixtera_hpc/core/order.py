"""The order of a domain's stream: blocks are permuted every epoch, rows are permuted within windows of permuted blocks.

A permutation is never stored. It is a stable sort of counter-based random words (Philox, Salmon et al. 2011) with the
key (seed, domain) and the counter (epoch, window). Any position of any epoch is therefore reached with one O(blocks)
pass over the domain's blocks and a binary search.

Only raw Philox words are used, because their stream is fixed. `Generator.permutation` may change between numpy
releases.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_WORDS", "ROW_WORDS", "EpochOrder", "Shuffle", "ShuffleOrder"]

Shuffle = Literal["none", "block", "window", "sequence"]
Ints = NDArray[np.int64]

# The purpose of random words, part of the counter: blocks and rows must not share words.
BLOCK_WORDS = 0
ROW_WORDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The order of one domain's blocks in one epoch, and the windows they form."""

    block_order: Ints
    """Positions in the domain's block list; shape (num_blocks,)."""
    first_block: Ints
    """Position in `block_order` of the first block of every window, followed by num_blocks.

    The shape is (num_windows + 1,).
    """
    starts: Ints
    """First item of every window, followed by the number of items in the epoch; shape (num_windows + 1,)."""

    def window_at(self, item: int) -> int:
        """Return the window that holds item `item` of the epoch, in O(log windows) time."""
        return int(np.searchsorted(self.starts, item, side="right")) - 1

    def blocks_of(self, window: int) -> Ints:
        """Return the blocks of `window` in order, as positions in the domain's block list."""
        return self.block_order[self.first_block[window] : self.first_block[window + 1]]

    def window_of_block(self, block: int) -> int:
        """Return the window of a block, given its position in the domain's block list."""
        place = int(np.flatnonzero(self.block_order == block)[0])
        return int(np.searchsorted(self.first_block, place, side="right")) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffleOrder:
    """Shuffle the streams of all domains from one seed."""

    seed: int
    shuffle: Shuffle
    """`none`: no shuffle. `block`: shuffle blocks. `window`: shuffle blocks, and the rows of each window. `sequence`:
    no shuffle here; `SequenceShuffle` permutes the sequences."""
    window_bytes: int
    """Decoded bytes of a window; used with `shuffle="window"` only."""

    def epoch(self, domain: int, epoch: int, sizes: Ints, block_bytes: Ints) -> EpochOrder:
        """Order the blocks of `domain` for `epoch`, in O(blocks) time.

        Args:
            domain: domain_id.
            epoch: number of passes over the domain before.
            sizes: items of the domain in every block; shape (num_blocks,).
            block_bytes: decoded bytes of every block, other domains included; shape (num_blocks,).
        """
        # "block" is a shuffle with windows of one block, whose rows stay in order.
        if self.shuffle in ("none", "sequence"):
            block_order = np.arange(len(sizes))
        else:
            block_order = _permutation(self._words(domain, epoch, 0, BLOCK_WORDS, len(sizes)))
        first_block = np.arange(len(sizes) + 1)
        if self.shuffle == "window":
            first_block = _first_blocks(block_bytes[block_order], self.window_bytes)

        # A window starts where the last block of the previous window ends.
        item_starts = np.concatenate([[0], np.cumsum(sizes[block_order])])
        return EpochOrder(block_order=block_order, first_block=first_block, starts=item_starts[first_block])

    def rows(self, domain: int, epoch: int, window: int, num_rows: int) -> Ints:
        """Return the order of the rows of a window; a permutation of shape (num_rows,)."""
        if self.shuffle != "window":
            return np.arange(num_rows)
        return _permutation(self._words(domain, epoch, window, ROW_WORDS, num_rows))

    def _words(self, domain: int, epoch: int, window: int, purpose: int, num_words: int) -> NDArray[np.uint64]:
        """Return the raw Philox words of one permutation."""
        # Philox advances the first counter word; the others separate the streams.
        key = np.array([self.seed, domain], np.uint64)
        counter = np.array([0, window, epoch, purpose], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(num_words)


def _first_blocks(block_bytes: Ints, window_bytes: int) -> Ints:
    """Return the first block of every window, followed by the number of blocks; shape (num_windows + 1,).

    Window i consists of the blocks that begin in the bytes [i * window_bytes, (i + 1) * window_bytes). A block that is
    longer than a window is a window of its own, or the last block of one.
    """
    if not len(block_bytes):
        return np.zeros(1, np.int64)
    cell = (np.cumsum(block_bytes) - block_bytes) // window_bytes
    return np.concatenate([[0], np.flatnonzero(np.diff(cell)) + 1, [len(cell)]])


def _permutation(words: NDArray[np.uint64]) -> Ints:
    """Return the permutation that sorts `words`; equal words keep their order."""
    return np.argsort(words, kind="stable")
