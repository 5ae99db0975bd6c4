"""The samples of blocks, sorted by domain: one read of the index serves all domains of a block, in every epoch.

Price: about 0.2 µs per sample of a block, once as long as all blocks in use fit into the budget, and about 15 bytes of
memory per selected sample.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading.lookup.columns import GrowingColumns, concatenated_ranges, narrow_type
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout

__all__ = ["BlockSamples", "ReadBlocks"]

Ints = NDArray[np.int64]
ReadBlocks = Callable[[NDArray[np.int32]], SampleColumns]

SAMPLES_PER_READ = 1 << 18
"""Samples that are sorted together: few calls, but temporary arrays of a few megabytes."""


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
            "domain": narrow_type(layout.table.num_domains),
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
        # Samples of each block in `columns`; -1 for blocks that are not in memory.
        self._first = np.full(len(self._rows), -1, np.int32)
        self._stop = np.full(len(self._rows), -1, np.int32)

    def load(self, blocks: NDArray[np.int32]) -> None:
        """Have the samples of all `blocks` in memory, which may repeat. The samples of others may be dropped."""
        missing = np.unique(blocks[self._first[blocks] < 0])
        if not len(missing):
            return
        num_bytes = (len(self.columns) + int(self._rows[missing].sum(dtype=np.int64))) * self.columns.row_bytes
        if num_bytes > self._max_bytes and len(self.columns):
            self.columns.clear()
            self._first[:] = -1
            missing = np.unique(blocks)
        part = np.cumsum(self._rows[missing], dtype=np.int64) // SAMPLES_PER_READ
        for of_part in np.split(missing, np.flatnonzero(np.diff(part)) + 1):
            self._read(of_part)

    def locate(self, blocks: NDArray[np.int32], domain: Ints) -> tuple[Ints, Ints]:
        """Return the first sample in `columns` of a domain in each loaded block, and one past the last.

        Args:
            blocks: any blocks.
            domain: the domain that is looked for in each of them.
        """
        first = self._first[blocks].astype(np.int64)
        stop = self._stop[blocks].astype(np.int64)
        values = self.columns["domain"]
        return _lower_bound(values, first, stop, domain), _lower_bound(values, first, stop, domain + 1)

    def samples_of(self, blocks: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ints, Ints]:
        """Return block, domain and row of the samples of some blocks that streams have, sorted by block and domain."""
        self.load(blocks)
        first = self._first[blocks].astype(np.int64)
        count = self._stop[blocks] - first
        chosen = concatenated_ranges(first, count)
        block = np.repeat(blocks, count)
        if "is_served" in self.columns:
            is_served = self.columns["is_served"][chosen]
            chosen = chosen[is_served]
            block = block[is_served]
        return block, self.columns["domain"][chosen].astype(np.int64), self.columns["row"][chosen].astype(np.int64)

    def _read(self, blocks: NDArray[np.int32]) -> None:
        """Read blocks, sort their samples by block and domain, and append them."""
        samples = self._read_blocks(blocks)
        rows = self._rows[blocks]
        domain = self._domain_of(samples)
        position = np.repeat(np.arange(len(blocks)), rows)

        # Samples that no domain has are left out.
        key = position * self._layout.table.num_domains + domain
        chosen = np.flatnonzero(domain >= 0)
        key = key[chosen]
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            chosen = chosen[order]

        position = position[chosen]
        first_sample = np.cumsum(rows, dtype=np.int64) - rows
        first_byte = np.cumsum(samples.length) - samples.length
        columns: dict[str, NDArray[Any]] = {
            "domain": domain[chosen],
            "row": chosen - first_sample[position],
            "offset": first_byte[chosen] - first_byte[np.minimum(first_sample, len(first_byte) - 1)][position],
            "length": samples.length[chosen],
        }
        if self._layout.in_tokens:
            columns["items"] = samples.tokens[chosen] + self._layout.added_tokens(blocks[position])
        if self._is_not_dropped is not None:
            columns["is_served"] = self._is_not_dropped(samples)[chosen]

        stop = len(self.columns) + np.cumsum(np.bincount(position, minlength=len(blocks)))
        self._first[blocks] = np.append(len(self.columns), stop[:-1])
        self._stop[blocks] = stop
        self.columns.append(columns)


def _lower_bound(values: NDArray[Any], first: Ints, stop: Ints, wanted: Ints) -> Ints:
    """Return the first position in [first, stop) whose value is at least `wanted`, or `stop`; ranges ascend."""
    low = first
    count = stop - first
    while count.any():
        half = count // 2
        middle = low + half
        is_below = (values[np.minimum(middle, len(values) - 1)] < wanted) & (count > 0)
        low = np.where(is_below, middle + 1, low)
        count = np.where(is_below, count - half - 1, half)
    return low
