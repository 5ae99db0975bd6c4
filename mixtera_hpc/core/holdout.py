"""Hold samples out for validation, and limit domains to a fraction: a hash of each sample's identity decides.

The identity of a sample is the path of its shard below the data root and its row in the shard. A sample therefore stays
on its side of the split if shards are added, blocks are cut differently, or domains and queries change.

With `fraction`, a domain consists of the training samples with the smallest hashes. A larger fraction therefore keeps
all samples of a smaller one, and held-out samples are the same with any fraction.

To a query the hash is one more number property, uniform in [0, 1), whose name no expression can contain.

Price: counting a split takes one pass over the combos and tokens of all selected samples, where a query over
categorical properties reads no samples at all. docs/decisions has the reasons.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_assignment import DomainAssignment
from mixtera_hpc.core.index_tables import BlockTable, IndexTables, SampleColumns, Zones
from mixtera_hpc.core.query.predicate import Entries, MatchMask, Predicate

__all__ = [
    "HOLDOUT_HASH",
    "Split",
    "add_holdout_hashes",
    "add_holdout_zones",
    "restrict_to_fractions",
    "restrict_to_split",
    "shard_hash_keys",
]

Split = Literal["train", "validation"]
HOLDOUT_HASH = "held out"
"""Name of the number property. It is not an identifier, so it cannot collide with a user's property."""

HashWords = NDArray[np.uint64]
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Increment of SplitMix64, 2^64 divided by the golden ratio."""


def shard_hash_keys(paths: Sequence[str], seed: int) -> HashWords:
    """Return the hash key of every shard, derived from its path and the seed; shape (num_shards,)."""
    # Python's own hash of a text differs between processes.
    digests = [hashlib.blake2b(f"{seed}\n{path}".encode(), digest_size=8).digest() for path in paths]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def add_holdout_hashes(
    columns: SampleColumns, keys: HashWords, blocks: BlockTable, chosen: NDArray[np.int32]
) -> SampleColumns:
    """Return `columns` with the hash of every sample as the number `HOLDOUT_HASH`.

    Args:
        columns: the samples of the blocks `chosen`, concatenated.
        keys: of `shard_hash_keys`.
        blocks: all blocks of the index.
        chosen: block numbers.
    """
    # The row of every sample inside its shard.
    rows = blocks.rows[chosen].astype(np.int64)
    ends = np.cumsum(rows)
    row = np.arange(int(rows.sum())) - np.repeat(ends - rows - blocks.first_row[chosen], rows)

    # SplitMix64 with the shard's key as the seed, at position `row`. uint64 arithmetic wraps around, as it must.
    words = row.astype(np.uint64)
    words *= GOLDEN_GAMMA
    words += np.repeat(keys[blocks.shard[chosen]], rows)

    # The upper 53 bits as a float64 in [0, 1).
    position = (_mix_in_place(words) >> np.uint64(11)).astype(np.float64)
    position *= 2.0**-53
    return replace(columns, numbers={**columns.numbers, HOLDOUT_HASH: position})


def add_holdout_zones(tables: IndexTables) -> IndexTables:
    """Return `tables` with zones of [0, 1] for `HOLDOUT_HASH`: every block may hold samples of both sides."""
    num_blocks = len(tables.blocks)
    zone = Zones(low=np.zeros(num_blocks), high=np.ones(num_blocks), has_null=np.zeros(num_blocks, np.bool_))
    return replace(tables, blocks=replace(tables.blocks, zones={**tables.blocks.zones, HOLDOUT_HASH: zone}))


def restrict_to_split(predicate: Predicate, fraction: float, split: Split) -> Predicate:
    """Return `predicate` restricted to one side of the split.

    Args:
        predicate: selects samples of both sides.
        fraction: share of the samples that is held out for validation.
        split: the side to select.
    """

    def evaluate(entries: Entries) -> MatchMask:
        low = entries.low[HOLDOUT_HASH]
        high = entries.high[HOLDOUT_HASH]
        held_out = MatchMask(low < fraction, high < fraction)
        return predicate.evaluate(entries) & (held_out if split == "validation" else ~held_out)

    return Predicate(predicate.text, evaluate, predicate.numbers | {HOLDOUT_HASH})


def restrict_to_fractions(
    predicate: Predicate, assignment: DomainAssignment, fractions: Sequence[float], held_out: float
) -> Predicate:
    """Return `predicate` restricted to a fraction of the training samples of each domain.

    Args:
        predicate: selects training samples.
        assignment: the domain of every sample.
        fractions: share of the training samples of each domain that is selected, above 0 and at most 1.
        held_out: share of all samples that is held out; they have the smallest hashes.
    """
    # Hashes below the limit are selected. The last entry is that of samples without a domain, which have number -1.
    limits = [held_out + fraction * (1 - held_out) if fraction < 1 else np.inf for fraction in fractions]
    limit_of = np.array([*limits, np.inf])[assignment.domain]
    lowest = limit_of.min(axis=1)
    highest = limit_of.max(axis=1)

    def evaluate(entries: Entries) -> MatchMask:
        low_limit = lowest[entries.combo]
        high_limit = highest[entries.combo]
        if assignment.grid.cuts:
            # Where the numbers of an entry decide its bucket, the limit is known.
            bucket, is_known = _bucket_of_entries(assignment, entries)
            known = limit_of[entries.combo, bucket]
            low_limit = np.where(is_known, known, low_limit)
            high_limit = np.where(is_known, known, high_limit)
        within = MatchMask(entries.low[HOLDOUT_HASH] < high_limit, entries.high[HOLDOUT_HASH] < low_limit)
        return predicate.evaluate(entries) & within

    return Predicate(predicate.text, evaluate, predicate.numbers | assignment.numbers | {HOLDOUT_HASH})


def _bucket_of_entries(assignment: DomainAssignment, entries: Entries) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return a possible bucket of every entry, and whether it is the only one; shape (n,) each."""
    size = len(entries.combo)
    bucket = assignment.grid.buckets_of_samples(entries.low, size)
    is_known = bucket == assignment.grid.buckets_of_samples(entries.high, size)
    for name in assignment.numbers:
        is_known &= ~entries.has_null[name] | np.isnan(entries.low[name])
    return bucket, is_known


def _mix_in_place(words: HashWords) -> HashWords:
    """Apply the output function of SplitMix64 (Steele, Lea, Flood 2014) to `words` in place, and return them."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words
