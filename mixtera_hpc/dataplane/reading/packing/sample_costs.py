"""The cost of every sample, from a number property of the index.

Price: 8 bytes per row of the blocks that were used last, and one read of the column for every block.
"""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.index.read.joined_samples import open_samples

__all__ = ["SampleCosts"]

Floats = NDArray[np.float64]

COLUMN_CACHE_BYTES = 16 << 20
MAX_BLOCKS_IN_MEMORY = 16384


class SampleCosts:
    """The costs of samples, read when they are needed. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source) -> None:
        """Open nothing yet."""
        self._source = source
        self._name = source.config.dataplane.sample_cost or ""
        self._reader = open_samples(source.index.sample_sources, COLUMN_CACHE_BYTES)
        self._blocks: OrderedDict[int, Floats] = OrderedDict()
        """Block → cost of every row, the block used last at the end."""

    def of_documents(self, documents: Documents) -> Floats:
        """Return the cost of every sample; shape (n,)."""
        blocks = np.unique(documents.block)
        self._read([block for block in blocks.tolist() if block not in self._blocks])
        costs = np.empty(len(documents.block))
        order = np.argsort(documents.block, kind="stable")
        borders = np.searchsorted(documents.block[order], np.append(blocks, blocks[-1:] + 1)).tolist()
        for block, (begin, end) in zip(blocks.tolist(), pairwise(borders), strict=True):
            self._blocks.move_to_end(block)
            costs[order[begin:end]] = self._blocks[block][documents.row[order[begin:end]]]
        while len(self._blocks) > MAX_BLOCKS_IN_MEMORY:
            self._blocks.popitem(last=False)
        return costs

    def _read(self, blocks: list[int]) -> None:
        if not blocks:
            return
        table = self._source.blocks
        rows = table.rows[blocks]
        columns = self._reader.read_many(table.first_sample[blocks].tolist(), rows.tolist(), {f"numbers/{self._name}"})
        parts = np.split(columns.numbers[self._name], np.cumsum(rows)[:-1])
        self._blocks.update(zip(blocks, parts, strict=True))
