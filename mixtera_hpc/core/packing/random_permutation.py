"""Random permutations of [0, size) in closed form, in both directions, without a table.

A Feistel network over two digits, each with about √size values, permutes the numbers below the product of their bases
(the generalized Feistel cipher of Black and Rogaway 2002). This product exceeds `size` by less than √size. A result
outside the range is permuted again until it falls inside (cycle walking, in the same paper), which is rarely needed.
Price: about 100 numpy calls for any number of values, and no memory. Many permutations are computed in one call,
because every value has a key and a size of its own.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["permutation_keys", "permute", "unpermute"]

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

NUM_ROUNDS = 8
"""Four rounds make a pseudo-random permutation (Luby and Rackoff 1988); digits with few values need more. With eight
rounds and at least 30 numbers, all pairs of places are equally frequent in 200,000 permutations."""

_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_KEYS = np.array([(number + 1) * _GOLDEN % 2**64 for number in range(NUM_ROUNDS)], np.uint64)[:, None]
"""Added to the key of a permutation in each round."""

# Arrays of no dimension: numpy converts a scalar in every call, which takes as long as the call for 512 values.
_ONE, _27, _30, _31 = (np.array(number, np.uint64) for number in (1, 27, 30, 31))
_FIRST_FACTOR = np.array(0xBF58476D1CE4E5B9, np.uint64)
_SECOND_FACTOR = np.array(0x94D049BB133111EB, np.uint64)


def permutation_keys(seed: int, *numbers: Ints) -> Words:
    """Return one key for each tuple of `numbers`; the arrays have the same shape."""
    keys = np.full(np.shape(numbers[0]), seed, np.uint64)
    for number in numbers:
        words = number.astype(np.uint64)
        _mix(words)
        keys += words
        keys += np.uint64(_GOLDEN)
        _mix(keys)
    return keys


def permute(values: Ints, sizes: Ints, keys: Words) -> Ints:
    """Return the place of each value in the permutation of [0, size) with its key; all arrays have the same shape."""
    return _walk(values, sizes, keys, range(NUM_ROUNDS))


def unpermute(places: Ints, sizes: Ints, keys: Words) -> Ints:
    """Return the values whose places are `places`; the inverse of `permute`."""
    return _walk(places, sizes, keys, range(NUM_ROUNDS)[::-1])


class _Digits(NamedTuple):
    """The bases of both digits: the number of values that each can have; shape (n,) each."""

    low: Words
    high: Words

    def select(self, chosen: NDArray[np.intp]) -> "_Digits":
        """Return the bases at some positions."""
        return _Digits(self.low[chosen], self.high[chosen])


def _walk(values: Ints, sizes: Ints, keys: Words, rounds: range) -> Ints:
    """Apply the network until every value lies below its size."""
    limits = sizes.astype(np.uint64)
    # IEEE 754 defines the rounding of square roots, so the result is the same on every machine.
    low = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    digits = _Digits(low, (limits + low - np.uint64(1)) // low)
    current = _apply(values.astype(np.uint64), digits, keys, rounds)
    outside = np.flatnonzero(current >= limits)
    while len(outside):
        current[outside] = _apply(current[outside], digits.select(outside), keys[outside], rounds)
        outside = outside[current[outside] >= limits[outside]]
    return current.astype(np.int64)


def _apply(values: Words, digits: _Digits, keys: Words, rounds: range) -> Words:
    """Permute the numbers below the product of both bases; the rounds in reverse order undo it."""
    high, low = np.divmod(values, digits.low)
    shifts = keys + _ROUND_KEYS
    is_forward = rounds.step > 0
    for number in rounds:
        changed, other, size = (low, high, digits.low) if number % 2 == 0 else (high, low, digits.high)
        shift = shifts[number]
        shift += other
        _mix(shift)
        # The last bit is dropped, so that the sum below does not exceed 64 bits.
        shift >>= _ONE
        if not is_forward:
            shift %= size
            np.subtract(size, shift, out=shift)
        changed += shift
        changed %= size
    high *= digits.low
    high += low
    return high


def _mix(words: Words) -> None:
    """Apply the finalizer of splitmix64 (Steele, Lea, Flood 2014) to `words` in place; products are modulo 2**64."""
    shifted = words >> _30
    words ^= shifted
    words *= _FIRST_FACTOR
    np.right_shift(words, _27, out=shifted)
    words ^= shifted
    words *= _SECOND_FACTOR
    np.right_shift(words, _31, out=shifted)
    words ^= shifted
