"""Random permutations of [0, size) in closed form, in both directions, without a table.

A balanced Feistel network permutes the numbers of an even number of bits; a result outside the range is permuted again
until it falls inside (cycle walking, Black and Rogaway 2002). Price: about 100 numpy calls for any number of values,
and no memory. Many permutations are computed in one call, because every value has a key and a size of its own.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["permutation_keys", "permute", "unpermute"]

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

NUM_ROUNDS = 6
"""Four rounds make a pseudo-random permutation (Luby and Rackoff 1988); two more for numbers of a few bits."""

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def permutation_keys(seed: int, *numbers: Ints) -> Words:
    """Return one key for each tuple of `numbers`; the arrays have the same shape."""
    keys = np.full(np.shape(numbers[0]), seed, np.uint64)
    for number in numbers:
        keys = _mix(keys + np.uint64(_GOLDEN) + _mix(number.astype(np.uint64)))
    return keys


def permute(values: Ints, sizes: Ints, keys: Words) -> Ints:
    """Return the place of each value in the permutation of [0, size) with its key; all arrays have the same shape."""
    return _walk(values, sizes, keys, range(NUM_ROUNDS))


def unpermute(places: Ints, sizes: Ints, keys: Words) -> Ints:
    """Return the values whose places are `places`; the inverse of `permute`."""
    return _walk(places, sizes, keys, range(NUM_ROUNDS)[::-1])


def _walk(values: Ints, sizes: Ints, keys: Words, rounds: range) -> Ints:
    """Apply the network until every value lies below its size."""
    current = values.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    half_bits = _half_bits(sizes)
    outside = np.arange(len(current))
    # The network is a permutation of fewer than four times `size` numbers, so a few rounds of the loop suffice.
    while len(outside):
        current[outside] = _apply(current[outside], half_bits[outside], keys[outside], rounds)
        outside = outside[current[outside] >= limits[outside]]
    return current.astype(np.int64)


def _apply(values: Words, half_bits: Words, keys: Words, rounds: range) -> Words:
    """Permute numbers of 2 * `half_bits` bits; the rounds in reverse order undo it."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left: Words = values >> half_bits
    right: Words = values & mask
    is_forward = rounds.step > 0
    for number in rounds:
        word = keys + np.uint64((number + 1) * _GOLDEN % 2**64)
        if is_forward:
            left, right = right, left ^ (_mix(right + word) & mask)
        else:
            left, right = right ^ (_mix(left + word) & mask), left
    return (left << half_bits) | right


def _half_bits(sizes: Ints) -> Words:
    """Return half of the bits that the numbers below `sizes` need, rounded up, at least 1."""
    # The exponent of a float is the number of bits of an integer below 2**53.
    _, num_bits = np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))
    return ((num_bits + 1) // 2).astype(np.uint64)


def _mix(words: Words) -> Words:
    """Return the finalizer of splitmix64 (Steele, Lea, Flood 2014); products are modulo 2**64."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST_FACTOR
    words = (words ^ (words >> np.uint64(27))) * _SECOND_FACTOR
    return words ^ (words >> np.uint64(31))
