"""The order of a domain's stream: blocks are permuted every epoch, rows are permuted within windows of permuted blocks.

A permutation is never stored. That of the rows of a window sorts counter-based random words (Philox, Salmon et al.
2011) with the key (seed, domain) and the counter (epoch, window). That of blocks sorts a hash of their numbers in the
index (SplitMix64, Steele et al. 2014), with a Philox word of (seed, epoch) as the key. So all domains pass through the
blocks that they share in one order, and domains that move at one speed need a block at the same time. Any position of
any epoch is reached with one O(blocks) pass over the domain's blocks and a binary search.

Only raw Philox words are used, because their stream is fixed. `Generator.permutation` may change between numpy
releases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_WORDS", "ROW_WORDS", "EpochOrder", "Shuffle", "ShuffleOrder"]

Shuffle = Literal["none", "block", "window", "sequence"]
Ints = NDArray[np.int64]

# The purpose of random words, part of the counter: blocks and rows must not share words.
BLOCK_WORDS = 0
ROW_WORDS = 1
BLOCK_STREAM = 0
"""The place of the domain in the key of the words of blocks, which all domains share."""
# Increment and multipliers of SplitMix64.
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


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

    @property
    def repeats(self) -> bool:
        """True if all epochs have their documents in the same order, because sequences are shuffled instead."""
        return self.shuffle == "sequence"

    def epoch(self, epoch: int, blocks: NDArray[np.integer[Any]], sizes: Ints, block_bytes: Ints) -> EpochOrder:
        """Order the blocks of a domain for `epoch`, in O(blocks) time.

        Args:
            epoch: number of passes over the domain before.
            blocks: number in the index of every block of the domain; shape (num_blocks,).
            sizes: items of the domain in every block; shape (num_blocks,).
            block_bytes: decoded bytes of every block, other domains included; shape (num_blocks,).
        """
        # "block" is a shuffle with windows of one block, whose rows stay in order.
        if self.shuffle in ("none", "sequence"):
            block_order = np.arange(len(sizes))
        else:
            block_order = self._blocks(epoch, blocks)
        first_block = np.arange(len(sizes) + 1)
        if self.shuffle == "window":
            first_block = _first_blocks(block_bytes[block_order], self.window_bytes)

        # A window starts where the last block of the previous window ends.
        item_starts = np.concatenate([[0], np.cumsum(sizes[block_order])])
        return EpochOrder(block_order=block_order, first_block=first_block, starts=item_starts[first_block])

    def rows(self, domain: int, epoch: int, window: int, num_rows: int) -> Ints:
        """Return the order of the rows of a window; a permutation of shape (num_rows,)."""
        return self.rows_of_windows([(domain, epoch, window)], [num_rows])

    def rows_of_windows(self, windows: Sequence[tuple[int, int, int]], num_rows: Sequence[int]) -> Ints:
        """Return the order of the rows of several windows, one window after the other.

        Args:
            windows: domain, epoch and number of each window.
            num_rows: of each window.

        Returns:
            Positions among the rows of all windows, whose windows do not mix; shape (sum(num_rows),).
        """
        if self.shuffle != "window":
            return np.arange(sum(num_rows))
        # A new generator takes longer than the words of a small window.
        generator = np.random.Philox(key=np.zeros(2, np.uint64))
        state = generator.state
        state["state"]["key"][0] = self.seed
        start = 0
        orders = [np.zeros(0, np.int64)]
        for (domain, epoch, window), count in zip(windows, num_rows, strict=True):
            state["state"]["key"][1] = domain
            # Philox advances the first counter word; the others separate the streams.
            state["state"]["counter"][:] = 0, window, epoch, ROW_WORDS
            generator.state = state
            orders.append(_ascending(generator.random_raw(count)) + start)
            start += count
        return np.concatenate(orders)

    def _blocks(self, epoch: int, blocks: NDArray[np.integer[Any]]) -> Ints:
        """Return the order of some blocks of the index, as positions in `blocks`."""
        # No two words are equal, so the order does not depend on the algorithm that sorts.
        return np.argsort(block_words(self._words(BLOCK_STREAM, [0, 0, epoch, BLOCK_WORDS], 1), blocks))

    def _words(self, stream: int, counter: list[int], num_words: int) -> NDArray[np.uint64]:
        """Return raw Philox words with the key (seed, stream)."""
        key = np.array([self.seed, stream], np.uint64)
        return np.random.Philox(key=key, counter=np.array(counter, np.uint64)).random_raw(num_words)


def _ascending(words: NDArray[np.uint64]) -> Ints:
    """Return the positions of words in ascending order. Equal words, which are very rare, keep their order."""
    order = np.argsort(words)
    ordered = words[order]
    # A stable sort takes four times as long.
    return np.argsort(words, kind="stable") if (ordered[1:] == ordered[:-1]).any() else order


def block_words(keys: NDArray[np.uint64], blocks: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """Return a random word per block of the index; no two are equal for one key. `keys` and `blocks` broadcast."""
    # Each operation is invertible, so different blocks have different words. Overflow is intended.
    words = keys + blocks.astype(np.uint64) * _GOLDEN_GAMMA
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def _first_blocks(block_bytes: Ints, window_bytes: int) -> Ints:
    """Return the first block of every window, followed by the number of blocks; shape (num_windows + 1,).

    Window i consists of the blocks that begin in the bytes [i * window_bytes, (i + 1) * window_bytes). A block that is
    longer than a window is a window of its own, or the last block of one.
    """
    if not len(block_bytes):
        return np.zeros(1, np.int64)
    cell = (np.cumsum(block_bytes) - block_bytes) // window_bytes
    return np.concatenate([[0], np.flatnonzero(np.diff(cell)) + 1, [len(cell)]])
