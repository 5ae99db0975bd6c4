"""The samples of blocks, sorted by domain: one read of the index serves all domains of a block, in every epoch.

Price: about 0.2 µs per sample of a block, once as long as all blocks in use fit into the budget. Blocks with one domain
only are read without the columns that decide the domain. The memory is about 13 bytes per selected sample, and 12 bytes
per domain that a block has.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading.lookup.columns import GrowingColumns, concatenated_ranges, narrow_type
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout
from mixtera_hpc.errors import DataError

__all__ = ["BlockSamples", "ReadBlocks", "item_count_error"]

Ints = NDArray[np.int64]

SAMPLES_PER_READ = 1 << 16
"""Samples that are sorted together: few calls, but none holds the interpreter's lock for more than 1 ms."""
MAX_SORT_BITS = 63
"""Bits of a key and of a position that fit into one integer."""


class ReadBlocks(Protocol):
    """A function that reads the sample columns of some blocks, one block after the other."""

    def __call__(self, blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        """Return the columns; if `only_sizes`, only those of lengths and tokens."""


class BlockSamples:
    """A cache of the samples of blocks, within a byte budget."""

    def __init__(
        self,
        layout: StreamLayout,
        read_blocks: ReadBlocks,
        domain_of: Callable[[SampleColumns], NDArray[np.int32]],
        is_not_dropped: Callable[[SampleColumns], NDArray[np.bool_]] | None,
        max_bytes: int,
    ) -> None:
        """Read nothing yet; see `DomainStreams` for the functions.

        Args:
            max_bytes: budget. Blocks that are requested together are kept, even if they alone exceed it.
        """
        self._layout = layout
        self._rows = layout.blocks.rows
        self._read_blocks = read_blocks
        self._domain_of = domain_of
        self._is_not_dropped = is_not_dropped
        self._max_bytes = max_bytes
        longest = int(layout.blocks.length.max(initial=0))
        types: dict[str, DTypeLike] = {
            "row": narrow_type(int(self._rows.max(initial=0))),
            "offset": narrow_type(longest),
            "length": narrow_type(longest),
        }
        if layout.in_tokens:
            types["items"] = np.int64
        if is_not_dropped is not None:
            types["is_served"] = np.bool_
        self.columns = GrowingColumns(types)
        """All samples in memory, block by block, sorted by domain inside a block."""
        self._only_domain = layout.only_domains()
        self._cells = GrowingColumns({"key": np.int64, "first": np.int32})
        """The samples of one domain in one block, as key (rank of the block, domain) and first sample in `columns`."""
        self._rank = np.full(len(self._rows), -1, np.int32)
        """Rank of each block in `columns`; -1 for blocks that are not in memory."""
        self._num_blocks = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all samples in memory."""
        return len(self.columns) * self.columns.row_bytes + len(self._cells) * self._cells.row_bytes

    def load(self, blocks: NDArray[np.int32]) -> None:
        """Have the samples of all `blocks` in memory, which may repeat. The samples of others may be dropped."""
        missing = np.unique(blocks[self._rank[blocks] < 0])
        if not len(missing):
            return
        # Blocks have about the same size.
        sample_bytes = self.num_bytes / len(self.columns) if len(self.columns) else self.columns.row_bytes
        more_bytes = int(self._rows[missing].sum(dtype=np.int64)) * sample_bytes
        if self.num_bytes + more_bytes > self._max_bytes and len(self.columns):
            self.columns.clear()
            self._cells.clear()
            self._rank[:] = -1
            self._num_blocks = 0
            missing = np.unique(blocks)
        has_one_domain = self._only_domain[missing] >= 0
        for blocks in (missing[has_one_domain], missing[~has_one_domain]):
            # Blocks whose samples end in the same multiple of `SAMPLES_PER_READ` are read together.
            part = np.cumsum(self._rows[blocks], dtype=np.int64) // SAMPLES_PER_READ
            for of_part in np.split(blocks, np.flatnonzero(np.diff(part)) + 1):
                if len(of_part):
                    self._read(of_part)

    def locate(self, blocks: NDArray[np.int32], domain: Ints) -> tuple[Ints, Ints]:
        """Return the first sample in `columns` of a domain in each loaded block, and one past the last.

        Args:
            blocks: any blocks.
            domain: the domain that is looked for in each of them.
        """
        # The keys ascend, because blocks are appended in the order of their ranks.
        wanted = self._first_key(blocks) + domain
        cell = np.searchsorted(self._cells["key"], wanted)
        first, count = self._samples_of_cells(cell)
        is_found = self._cells["key"][np.minimum(cell, len(self._cells) - 1)] == wanted
        return first, first + np.where(is_found, count, 0)

    def _first_key(self, blocks: NDArray[np.int32]) -> Ints:
        """Return the key of the first domain in loaded blocks."""
        return self._rank[blocks].astype(np.int64) * self._layout.table.num_domains

    def _samples_of_cells(self, cell: NDArray[np.intp]) -> tuple[Ints, Ints]:
        """Return the first sample of cells, and the number of their samples; 0 behind the last cell."""
        first = self._cells["first"]
        num_samples = len(self.columns)
        begin = np.where(cell < len(first), first[np.minimum(cell, len(first) - 1)], num_samples).astype(np.int64)
        end = np.where(cell + 1 < len(first), first[np.minimum(cell + 1, len(first) - 1)], num_samples)
        return begin, end - begin

    def samples_of(self, blocks: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ints, Ints]:
        """Return block, domain and row of the samples of some blocks that streams have, sorted by block and domain."""
        self.load(blocks)
        keys = self._cells["key"]
        # All cells of each block, and then all samples of each cell.
        first_key = self._first_key(blocks)
        first_cell = np.searchsorted(keys, first_key)
        num_cells = np.searchsorted(keys, first_key + self._layout.table.num_domains) - first_cell
        cell = concatenated_ranges(first_cell, num_cells)
        first, count = self._samples_of_cells(cell)
        chosen = concatenated_ranges(first, count)
        block = np.repeat(np.repeat(blocks, num_cells), count)
        domain = np.repeat(keys[cell] % self._layout.table.num_domains, count)
        if "is_served" in self.columns:
            is_served = self.columns["is_served"][chosen]
            chosen = chosen[is_served]
            block = block[is_served]
            domain = domain[is_served]
        return block, domain, self.columns["row"][chosen].astype(np.int64)

    def _read(self, blocks: NDArray[np.int32]) -> None:
        """Read blocks, sort their samples by block and domain, and append them.

        All blocks have samples of one domain only, or none has.
        """
        has_one_domain = bool(self._only_domain[blocks[0]] >= 0)
        samples = self._read_blocks(blocks, only_sizes=has_one_domain)
        rows = self._rows[blocks]
        domain = np.repeat(self._only_domain[blocks], rows) if has_one_domain else self._domain_of(samples)
        position = np.repeat(np.arange(len(blocks)), rows)

        # Samples that no domain has are left out.
        chosen = np.flatnonzero(domain >= 0)
        key = (position * self._layout.table.num_domains + domain)[chosen]
        if (key[1:] < key[:-1]).any():
            order = _stable_order(key)
            chosen = chosen[order]
            key = key[order]

        position = position[chosen]
        # Positions and bytes are counted through all blocks of this read, and stored relative to their own block.
        first_sample = np.cumsum(rows, dtype=np.int64) - rows
        first_byte = np.cumsum(samples.length) - samples.length
        columns: dict[str, NDArray[Any]] = {
            "row": chosen - first_sample[position],
            "offset": first_byte[chosen] - first_byte[np.minimum(first_sample, len(first_byte) - 1)][position],
            "length": samples.length[chosen],
        }
        if self._layout.in_tokens:
            columns["items"] = samples.tokens[chosen] + self._layout.added_tokens(blocks[position])
        if self._is_not_dropped is not None:
            # Nothing was dropped of blocks whose samples are all in the stream of one domain.
            is_served = np.ones(len(domain), np.bool_) if has_one_domain else self._is_not_dropped(samples)
            columns["is_served"] = is_served[chosen]

        # A cell begins where the key changes.
        first_of_cell = np.flatnonzero(np.diff(key, prepend=-1))
        keys = key[first_of_cell] + self._num_blocks * self._layout.table.num_domains
        self._cells.append({"key": keys, "first": first_of_cell + len(self.columns)})
        self._rank[blocks] = np.arange(self._num_blocks, self._num_blocks + len(blocks))
        self._num_blocks += len(blocks)
        self.columns.append(columns)


def item_count_error(domain: int, num_blocks: int, num_items: int, expected: int) -> DataError:
    """Return the error for samples that do not add up to what the index counted for their blocks."""
    return DataError(
        f"The samples of {num_blocks} blocks of domain {domain} hold {num_items} items, the index counted {expected}: "
        "the index file is damaged.\n  Build it again with mixtera-hpc index build."
    )


def _stable_order(key: Ints) -> Ints:
    """Return the stable order of keys that are at least 0."""
    bits = len(key).bit_length()
    if int(key.max()).bit_length() + bits > MAX_SORT_BITS:
        return np.argsort(key, kind="stable")
    # numpy vectorises plain sorts, but not stable ones.
    return np.sort((key << bits) + np.arange(len(key))) & ((1 << bits) - 1)
