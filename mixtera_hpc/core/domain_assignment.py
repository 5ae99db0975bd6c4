"""Decide the domain of samples: by their combo, and by the buckets that their numbers lie in.

The ranges of all domain keys cut every number property into buckets. All numbers of a bucket match the same ranges, so
a table of (combo, bucket) → domain decides every sample. Null is a bucket of its own. Keys without ranges need one
bucket, and the table has one column. A block whose smallest and largest numbers leave only buckets of one domain is
decided without reading its samples.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_keys import DomainKey, KeyValue, NumberRange
from mixtera_hpc.core.index_tables import Zones
from mixtera_hpc.errors import MixtureError

__all__ = ["NO_DOMAIN", "BucketGrid", "DomainAssignment", "PossibleBuckets"]

NO_DOMAIN = -1
"""Domain of samples that belong to no domain."""
MAX_BUCKETS = 1024
"""Combinations of buckets of all number properties. Every block is compared with each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketGrid:
    """The buckets of every number property that domain keys name.

    A property with n cuts has n + 2 buckets: bucket i holds the numbers from cut i - 1 on and below cut i; the last
    one is null. A combination of buckets is numbered like the entries of an array with one axis per property.
    """

    cuts: Mapping[str, tuple[float, ...]]
    """Number property → ascending bounds of its buckets; properties are sorted by name."""

    @classmethod
    def of_keys(cls, keys: Sequence[DomainKey], numbers: Sequence[str]) -> "BucketGrid":
        """Return the buckets that the ranges of `keys` define.

        Args:
            keys: one per domain.
            numbers: the number properties of the index.

        Raises:
            MixtureError: there are too many combinations of buckets.
        """
        cuts: dict[str, set[float]] = {}
        for key in keys:
            for name in set(key).intersection(numbers):
                ranges = [value for value in key[name] if isinstance(value, NumberRange)]
                bounds = (bound for number_range in ranges for bound in number_range.cuts)
                cuts.setdefault(name, set()).update(bound for bound in bounds if math.isfinite(bound))
        grid = cls(cuts={name: tuple(sorted(bounds)) for name, bounds in sorted(cuts.items())})
        if grid.num_buckets > MAX_BUCKETS:
            raise MixtureError(
                f"The ranges of the domain keys cut {', '.join(grid.cuts)} into {grid.num_buckets:,} combinations of "
                f"buckets, at most {MAX_BUCKETS:,} are allowed.\n  Use fewer ranges, or derive a category with "
                "mixtera-hpc index derive."
            )
        return grid

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of buckets of every property."""
        return tuple(len(cuts) + 2 for cuts in self.cuts.values())

    @property
    def num_buckets(self) -> int:
        """Return the number of combinations of buckets; 1 without number properties."""
        return math.prod(self.shape)

    def buckets_matching(self, key: DomainKey) -> NDArray[np.bool_]:
        """Return which combinations of buckets match the ranges of `key`; shape (num_buckets,)."""
        matches = np.ones(self.shape, np.bool_)
        for axis, (name, cuts) in enumerate(self.cuts.items()):
            if name not in key:
                continue
            of_axis = _matching(cuts, key[name])
            matches &= of_axis.reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
        return matches.reshape(-1)

    def buckets_of_samples(self, numbers: Mapping[str, NDArray[np.float64]], count: int) -> NDArray[np.intp]:
        """Return the combination of buckets of each of `count` samples; null numbers are NaN."""
        bucket = np.zeros(count, np.intp)
        for (name, cuts), num_buckets in zip(self.cuts.items(), self.shape, strict=True):
            bucket = bucket * num_buckets + _bucket_of(cuts, numbers[name])
        return bucket

    def possible_buckets(self, zones: Mapping[str, Zones], blocks: slice) -> "PossibleBuckets":
        """Return which buckets the samples of some blocks may be in."""
        first = []
        last = []
        has_null = []
        for name, cuts in self.cuts.items():
            # A block of nulls has NaN bounds, which are in the bucket of null.
            first.append(_bucket_of(cuts, zones[name].low[blocks]))
            last.append(_bucket_of(cuts, zones[name].high[blocks]))
            has_null.append(zones[name].has_null[blocks])
        return PossibleBuckets(shape=self.shape, first=first, last=last, has_null=has_null)


@dataclass(frozen=True, slots=True, kw_only=True)
class PossibleBuckets:
    """The buckets that samples of blocks may be in: one array per number property, shape (num_blocks,) each."""

    shape: tuple[int, ...]
    first: list[NDArray[np.intp]]
    last: list[NDArray[np.intp]]
    has_null: list[NDArray[np.bool_]]

    def one_of_each(self) -> NDArray[np.intp]:
        """Return a combination of buckets that is possible in each block; shape (num_blocks,)."""
        bucket = np.zeros(len(self.first[0]), np.intp)
        for num_buckets, first in zip(self.shape, self.first, strict=True):
            bucket = bucket * num_buckets + first
        return bucket

    def allows(self, buckets: Sequence[int]) -> NDArray[np.bool_]:
        """Return in which blocks the combination of `buckets`, one of each property, is possible."""
        allowed = np.ones(len(self.first[0]), np.bool_)
        for axis, bucket in enumerate(buckets):
            is_null = bucket == self.shape[axis] - 1
            in_range = (self.first[axis] <= bucket) & (bucket <= self.last[axis])
            allowed &= in_range | self.has_null[axis] if is_null else in_range
        return allowed

    def all_alike(self, classes: NDArray[Any], block: NDArray[Any], combo: NDArray[Any]) -> NDArray[np.bool_]:
        """Return for which cells all possible combinations of buckets have the same class.

        Args:
            classes: class of every (combo, combination of buckets); shape (num_combos, num_buckets).
            block: position of the block of every cell among these blocks.
            combo: of every cell.
        """
        reference = classes[combo, self.one_of_each()[block]]
        alike = np.ones(len(combo), np.bool_)
        for number, buckets in enumerate(itertools.product(*map(range, self.shape))):
            possible = self.allows(buckets)[block]
            alike &= ~possible | (classes[combo, number] == reference)
        return alike


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAssignment:
    """The domain of every sample."""

    grid: BucketGrid
    domain: NDArray[np.int32]
    """Domain of every (combo, combination of buckets), `NO_DOMAIN` for none; shape (num_combos, num_buckets)."""

    @property
    def numbers(self) -> frozenset[str]:
        """Return the number properties that decide; if empty, combos alone do."""
        return frozenset(self.grid.cuts)

    def domain_of(
        self, combo: NDArray[np.integer[Any]], numbers: Mapping[str, NDArray[np.float64]]
    ) -> NDArray[np.int32]:
        """Return the domain of samples, given their combos and numbers; shape (rows,)."""
        # Without ranges there is one bucket, which is not worth an array of zeros.
        bucket = self.grid.buckets_of_samples(numbers, len(combo)) if self.grid.cuts else 0
        domain: NDArray[np.int32] = self.domain[combo, bucket]
        return domain


def _bucket_of(cuts: Sequence[float], values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the bucket of each value of one property."""
    buckets = np.searchsorted(np.array(cuts, np.float64), values, side="right")
    return np.where(np.isnan(values), len(cuts) + 1, buckets)


def _matching(cuts: Sequence[float], values: Sequence[KeyValue]) -> NDArray[np.bool_]:
    """Return which buckets of one property match any of the values of a key; shape (num_cuts + 2,)."""
    starts = np.array([-math.inf, *cuts])
    stops = np.array([*cuts, math.inf])
    matches = np.zeros(len(cuts) + 2, np.bool_)
    for value in values:
        if isinstance(value, NumberRange):
            low, high = value.cuts
            # No cut lies inside a bucket, so a bucket matches as a whole or not at all.
            matches[:-1] |= (starts >= low) & (stops <= high)
        elif value is None:
            matches[-1] = True
    return matches
