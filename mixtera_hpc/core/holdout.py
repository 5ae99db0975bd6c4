"""Which samples are held out for validation: a hash of each sample's own identity decides, and nothing else.

The identity is the shard's path below the data root and the row in it, so a sample stays on its side when shards are added,
blocks are cut differently, domains or queries change. To a query the hash is one more number, uniform in [0, 1), that no
expression can name. Price: the counts of a split need one pass over the combos and tokens of all selected samples, where a query
over categories needs none; docs/decisions says why.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable, IndexTables, SampleColumns, Zones
from mixtera_hpc.core.query import Entries, MatchMask, Predicate

__all__ = ["HOLDOUT_HASH", "Split", "add_holdout_hashes", "add_holdout_zones", "restrict_to_split", "shard_hash_keys"]

Split = Literal["train", "validation"]
HOLDOUT_HASH = "held out"
"""Name of the number; no identifier, so that it collides with no property."""

Words = NDArray[np.uint64]
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def shard_hash_keys(paths: Sequence[str], seed: int) -> Words:
    """One word for every shard; shape (num_shards,)."""
    digests = [hashlib.blake2b(f"{seed}\n{path}".encode(), digest_size=8).digest() for path in paths]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def add_holdout_hashes(
    columns: SampleColumns, keys: Words, blocks: BlockTable, chosen: NDArray[np.int32]
) -> SampleColumns:
    """`columns` of the blocks `chosen`, one after the other, with every sample's hash as a number."""
    rows = blocks.rows[chosen].astype(np.int64)
    ends = np.cumsum(rows)
    row = np.arange(int(rows.sum())) - np.repeat(ends - rows - blocks.first_row[chosen], rows)
    words = row.astype(np.uint64)
    words *= GAMMA
    words += np.repeat(keys[blocks.shard[chosen]], rows)
    place = (_mixed(words) >> np.uint64(11)).astype(np.float64)
    place *= 2.0**-53
    return replace(columns, numbers={**columns.numbers, HOLDOUT_HASH: place})


def add_holdout_zones(tables: IndexTables) -> IndexTables:
    """`tables` whose blocks may hold samples of both sides."""
    count = len(tables.blocks)
    zone = Zones(low=np.zeros(count), high=np.ones(count), has_null=np.zeros(count, np.bool_))
    return replace(tables, blocks=replace(tables.blocks, zones={**tables.blocks.zones, HOLDOUT_HASH: zone}))


def restrict_to_split(predicate: Predicate, fraction: float, split: Split) -> Predicate:
    """`predicate` on one side of the split."""

    def evaluate(entries: Entries) -> MatchMask:
        low, high = entries.low[HOLDOUT_HASH], entries.high[HOLDOUT_HASH]
        held_out = MatchMask(low < fraction, high < fraction)
        return predicate.evaluate(entries) & (held_out if split == "validation" else ~held_out)

    return Predicate(predicate.text, evaluate, predicate.numbers | {HOLDOUT_HASH})


def _mixed(words: Words) -> Words:
    """SplitMix64's output function (Steele, Lea, Flood 2014) in place: a shard's rows are a stream of that generator."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words
