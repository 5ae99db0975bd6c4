"""The order of the samples of a small domain in many epochs at once, equal to that of `ShuffleOrder`.

A domain whose blocks fit into one window repeats after few items; a sequence may hold thousands of its epochs. Price:
about 1 µs per sample and epoch, instead of 140 µs per epoch.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.order import BLOCK_WORDS, ROW_WORDS, ShuffleOrder
from mixtera_hpc.core.repeats.philox import philox_words

__all__ = ["epoch_rows", "is_one_window"]

Ints = NDArray[np.int64]


def is_one_window(order: ShuffleOrder, block_bytes: Ints) -> bool:
    """Return whether all rows of a domain with these blocks are shuffled together, or none are, in every epoch."""
    return order.shuffle != "window" or int(block_bytes.sum()) <= order.window_bytes


def epoch_rows(order: ShuffleOrder, domain: int, epochs: Ints, block_of_sample: Ints, num_blocks: int) -> Ints:
    """Return the samples of a domain in the order of each epoch; shape (num_epochs, num_samples).

    Args:
        order: the shuffle of the run; see `is_one_window`.
        domain: domain_id.
        epochs: numbers of the epochs.
        block_of_sample: position of the block of every sample in the domain's block list, ascending.
        num_blocks: length of that list.
    """
    shape = (len(epochs), len(block_of_sample))
    if order.shuffle == "none":
        return np.broadcast_to(np.arange(shape[1]), shape)
    blocks = _permutations(order, domain, epochs, BLOCK_WORDS, num_blocks)
    place_of_block = np.empty_like(blocks)
    np.put_along_axis(place_of_block, blocks, np.broadcast_to(np.arange(num_blocks), blocks.shape), axis=1)
    # Samples by the place of their block; those of a block stay in order.
    samples = np.argsort(place_of_block[:, block_of_sample], axis=1, kind="stable")
    if order.shuffle == "window":
        samples = np.take_along_axis(samples, _permutations(order, domain, epochs, ROW_WORDS, shape[1]), axis=1)
    return samples


def _permutations(order: ShuffleOrder, domain: int, epochs: Ints, purpose: int, count: int) -> Ints:
    """Return the permutation of `count` blocks, or of the rows of window 0, in every epoch; shape (E, count)."""
    counters = np.zeros((len(epochs), 4), np.uint64)
    counters[:, 2] = epochs
    counters[:, 3] = purpose
    return np.argsort(philox_words((order.seed, domain), counters, count), axis=1, kind="stable")
