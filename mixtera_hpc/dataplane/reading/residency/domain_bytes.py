"""Bytes of the domains and blocks of a source, decoded and on disk. Price: one pass over the blocks of all domains."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.residency.rows_ahead import decoded_blocks
from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["DomainBytes"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainBytes:
    """Bytes of one epoch of each domain; shape (K,)."""

    decoded: Floats
    """Decoded for it: its blocks, other domains included, in formats that decode whole blocks."""
    on_disk: Floats
    """The same blocks on disk."""
    own: Floats
    """Decoded bytes of the domain's own rows in these blocks."""
    single: Floats
    """Bytes of the domain's rows in formats that read single rows."""
    num_blocks: Floats
    """Blocks of the domain in formats that decode whole blocks."""
    collection: float
    """All blocks of the index that are decoded as a whole."""
    block_decoded: Floats
    """Decoded bytes of every block of the index; 0 in formats that read single rows. Shape (num_blocks,)."""
    block_on_disk: Floats
    """Bytes of each block on disk; shape (num_blocks,)."""

    @classmethod
    def of_source(cls, source: Source) -> "DomainBytes":
        """Add up the blocks of every domain."""
        table = source.layout.table
        blocks = source.blocks
        is_decoded = decoded_blocks(source)
        length = blocks.length.astype(np.float64)
        decoded = length * source.layout.expansion[blocks.shard]
        share = table.rows / np.maximum(blocks.rows[table.block], 1)
        domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
        whole = is_decoded[table.block]

        def sums(values: Floats) -> Floats:
            return np.bincount(domain, values, minlength=source.num_domains).astype(np.float64)

        return cls(
            decoded=sums(decoded[table.block] * whole),
            on_disk=sums(length[table.block] * whole),
            own=sums(decoded[table.block] * share * whole),
            single=sums(length[table.block] * share * ~whole),
            num_blocks=sums(whole.astype(np.float64)),
            collection=float(decoded[is_decoded].sum()),
            block_decoded=decoded * is_decoded,
            block_on_disk=length * is_decoded,
        )
