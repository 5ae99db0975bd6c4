"""The place of every row's tokens in a store. It follows from the index, so that ranks write in any order.

A store that grows keeps what it has: the rows of further blocks are laid out behind it.

Price: one sort of the cells of the index's histogram on every rank, and one of the rows of a unit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import IndexTables, SampleColumns
from mixtera_hpc.formats.registry import load_format

__all__ = ["StoreLayout", "StoreUnit"]

Ints = NDArray[np.int64]
UNIT_BYTES = 16 << 20
"""Blocks of one shard are tokenized together up to this size on disk."""


@dataclass(frozen=True, slots=True)
class StoreUnit:
    """Consecutive blocks of one shard."""

    first_block: int
    last_block: int
    """One past the last block."""
    num_bytes: int
    """Bytes of the blocks on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLayout:
    """The order of documents in a store: by combination of categorical values, then in index order."""

    tables: IndexTables
    is_laid_out: NDArray[np.bool_]
    """Mask of the blocks of shards of text that are not kept from before; shape (num_blocks,)."""
    cell_starts: Ints
    """First token of every cell of the histogram: the rows of one combination in one block."""
    first_rows: Ints
    """Rows before every block; shape (num_blocks + 1,)."""
    num_tokens: int
    """Tokens of the store, those that are kept included."""

    @classmethod
    def of(cls, tables: IndexTables, kept_blocks: int = 0, kept_tokens: int = 0) -> "StoreLayout":
        """Compute the layout of the store of an index.

        Args:
            tables: the index.
            kept_blocks: the first blocks, whose rows have their places already.
            kept_tokens: tokens in the store already; all others come after them.
        """
        blocks = tables.blocks
        shard_holds_text = np.array([not load_format(name).holds_tokens for name in tables.shards.format], np.bool_)
        is_laid_out = shard_holds_text[blocks.shard] & (np.arange(len(blocks)) >= kept_blocks)
        histogram = tables.histogram
        block_of_cell = np.repeat(np.arange(len(blocks)), np.diff(histogram.indptr))
        tokens = np.where(is_laid_out[block_of_cell], histogram.tokens, 0).astype(np.int64)

        # Cells are stored block by block; a stable sort keeps the blocks of one combination in order.
        order = np.argsort(histogram.combo, kind="stable")
        ends = kept_tokens + np.cumsum(tokens[order])
        cell_starts = np.empty(len(tokens), np.int64)
        cell_starts[order] = ends - tokens[order]
        return cls(
            tables=tables,
            is_laid_out=is_laid_out,
            cell_starts=cell_starts,
            first_rows=np.concatenate([[0], np.cumsum(blocks.rows, dtype=np.int64)]),
            num_tokens=kept_tokens + int(tokens.sum()),
        )

    def units(self) -> list[StoreUnit]:
        """Cut the blocks that are to be written into units."""
        blocks = self.tables.blocks
        units: list[StoreUnit] = []
        shard = -1
        for number, (own_shard, length) in enumerate(zip(blocks.shard.tolist(), blocks.length.tolist(), strict=True)):
            if not self.is_laid_out[number]:
                continue
            last = units[-1] if units else None
            if last is not None and own_shard == shard and last.last_block == number and last.num_bytes < UNIT_BYTES:
                units[-1] = StoreUnit(last.first_block, number + 1, last.num_bytes + length)
            else:
                units.append(StoreUnit(number, number + 1, length))
            shard = own_shard
        return units

    def row_starts(self, unit: StoreUnit, samples: SampleColumns) -> Ints:
        """Return the first token of every row of a unit; meaningless for rows that the build skipped.

        Args:
            unit: the unit.
            samples: the columns of its rows, block by block.
        """
        tables = self.tables
        rows = tables.blocks.rows[unit.first_block : unit.last_block]
        cells = slice(int(tables.histogram.indptr[unit.first_block]), int(tables.histogram.indptr[unit.last_block]))
        # Number of every cell and of the cell of every row: ascending by block, then by combination.
        num_combos = tables.combos.num_combos + 1
        num_cells = np.diff(tables.histogram.indptr[unit.first_block : unit.last_block + 1])
        keys = np.repeat(np.arange(len(rows)), num_cells) * num_combos + tables.histogram.combo[cells]
        key_of_row = np.repeat(np.arange(len(rows)), rows) * num_combos + samples.combo
        if not len(keys):
            return np.zeros(len(key_of_row), np.int64)  # The build skipped all rows.
        cell = np.minimum(np.searchsorted(keys, key_of_row), len(keys) - 1)

        # Tokens of the rows of the same cell that come before each row.
        order = np.argsort(cell, kind="stable")
        before = np.cumsum(samples.tokens[order]) - samples.tokens[order]
        is_first = np.diff(cell[order], prepend=-1) != 0
        inside = before - np.maximum.accumulate(np.where(is_first, before, 0))
        starts = np.empty(len(cell), np.int64)
        starts[order] = self.cell_starts[cells][cell[order]] + inside
        return starts
