"""Select cells of the histogram: the rows and tokens of every combo in every block that a predicate selects.

The index stores a histogram: for every block, the rows and tokens of each combo (a distinct combination of categorical
values) in it. One (block, combo) pair is a cell. A query is decided in three steps, each only for what the step before
leaves open:

1. per combo, if categorical properties decide;
2. per cell, from the zones of its block (the smallest and largest value of each number);
3. per sample, by reading the samples of the blocks that are still undecided, many blocks at once.

Memory is a few megabytes, regardless of the size of the index.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_assignment import BucketGrid
from mixtera_hpc.core.index_tables import IndexTables, SampleColumns
from mixtera_hpc.core.query.predicate import Entries, Predicate

__all__ = ["CellSelector", "HistogramCells", "PruningStatistics", "ReadSampleColumns"]

CELLS_PER_RANGE = 1 << 18
"""Histogram cells that are processed together: their columns stay in a core's cache."""
SAMPLES_PER_READ = 1 << 17
"""Samples that are read together; one block may have more."""
COUNTERS_PER_READ = 1 << 21
"""Limit of blocks × combos while samples are counted."""

ReadSampleColumns = Callable[[NDArray[np.int32]], SampleColumns]
"""Read the samples of the given blocks, concatenated."""


@dataclass(slots=True, kw_only=True)
class PruningStatistics:
    """Blocks of a query by the way they were decided. Every block is in exactly one of the four block counts."""

    pruned_by_histogram: int = 0
    """Blocks without a combo that may match."""
    pruned_by_zones: int = 0
    """Blocks that are ruled out only by their smallest and largest numbers."""
    decided_whole: int = 0
    """Blocks in which combos and zones decide every cell."""
    scanned_blocks: int = 0
    """Blocks whose samples were read."""
    scanned_samples: int = 0
    """Samples in the scanned blocks, without unreadable rows."""

    @property
    def blocks(self) -> int:
        """Number of all blocks."""
        return self.pruned_by_histogram + self.pruned_by_zones + self.decided_whole + self.scanned_blocks


@dataclass(frozen=True, slots=True)
class HistogramCells:
    """Some cells of the histogram, with ascending blocks; shape (num_cells,) each."""

    block: NDArray[np.int32]
    code: NDArray[Any]
    """The combo; after the buckets are known, combo × number of buckets + bucket."""
    rows: NDArray[Any]
    tokens: NDArray[Any]

    def select(self, mask: NDArray[np.bool_]) -> "HistogramCells":
        """Return the cells where `mask` is set, without a copy if all are."""
        positions = np.flatnonzero(mask)  # Taking positions is six times as fast as taking by a mask.
        if len(positions) == len(mask):
            return self
        return HistogramCells(
            block=self.block.take(positions),
            code=self.code.take(positions),
            rows=self.rows.take(positions),
            tokens=self.tokens.take(positions),
        )


class CellSelector:
    """Select the cells of the histogram that the samples of one query are in."""

    def __init__(
        self,
        tables: IndexTables,
        predicate: Predicate,
        grid: BucketGrid,
        classes: NDArray[np.int32],
        read_samples: ReadSampleColumns,
    ) -> None:
        """Evaluate the predicate on every combo.

        Args:
            tables: the index.
            predicate: selects the samples.
            grid: buckets of the numbers that domain keys name.
            classes: number of the class of every combo and bucket; shape (num_combos, num_buckets). Blocks that may
                hold buckets of different classes are read.
            read_samples: called for the blocks that combos and zones do not decide.
        """
        self.pruning = PruningStatistics()
        """Blocks by the way they were decided, of the ranges selected so far."""
        self._tables = tables
        self._predicate = predicate
        self._grid = grid
        self._classes = classes
        self._read_samples = read_samples
        mask = predicate.evaluate(_any_sample_of_each_combo(tables, predicate))
        # No query selects unreadable rows, not even a negation.
        readable = np.arange(tables.combos.num_combos) != tables.combos.bad
        self._may_match = mask.may_match & readable
        self._must_match = mask.must_match & readable

    def ranges(self) -> Iterator[HistogramCells]:
        """Yield the selected cells of each range of blocks; their counts cover selected samples only."""
        for start, stop in _block_ranges(self._tables.histogram.indptr):
            yield self._selected_cells(start, stop)

    def _selected_cells(self, start: int, stop: int) -> HistogramCells:
        """Return the selected cells of the blocks [start, stop), with the rows and tokens of selected samples only."""
        cells = self._cells_that_may_match(start, stop)
        num_possible = _count_distinct(cells.block)
        self.pruning.pruned_by_histogram += stop - start - num_possible
        if not self._predicate.numbers and not self._grid.cuts:
            self.pruning.decided_whole += num_possible
            return cells

        # Cells whose combo does not decide are evaluated on the zones of their block.
        must_match = self._must_match.take(cells.code)
        may_match = must_match.copy()
        unclear = ~must_match
        may_match[unclear], must_match[unclear] = self._evaluate_zones(cells, unclear)

        # Blocks with a cell that is still undecided are read. All cells of these blocks are then counted from samples.
        cells, is_clear = self._with_buckets(cells, start, stop)
        must_match &= is_clear
        undecided = np.unique(cells.block[may_match & ~must_match])
        num_possible_by_zones = _count_distinct(cells.block[may_match])
        self.pruning.pruned_by_zones += num_possible - num_possible_by_zones
        self.pruning.decided_whole += num_possible_by_zones - len(undecided)
        if not len(undecided):
            return cells.select(must_match)
        cells = cells.select(must_match & ~np.isin(cells.block, undecided))
        return _merge_by_block([cells, *self._scan_blocks(undecided)])

    def _cells_that_may_match(self, start: int, stop: int) -> HistogramCells:
        """Return the cells of the blocks [start, stop) whose combo may match."""
        histogram = self._tables.histogram
        entries = slice(int(histogram.indptr[start]), int(histogram.indptr[stop]))
        cells_per_block = np.diff(histogram.indptr[start : stop + 1])
        block = np.repeat(np.arange(start, stop, dtype=np.int32), cells_per_block)
        combo = histogram.combo[entries].astype(np.intp)  # numpy would convert it for every look-up otherwise.
        cells = HistogramCells(block, combo, histogram.rows[entries], histogram.tokens[entries])
        return cells.select(self._may_match.take(cells.code))

    def _with_buckets(self, cells: HistogramCells, start: int, stop: int) -> tuple[HistogramCells, NDArray[np.bool_]]:
        """Return cells of the blocks [start, stop) with a possible bucket, and for which all possible ones are alike.

        The zones of a block, which cover all its samples, decide which buckets are possible.
        """
        if not self._grid.cuts:
            return cells, np.ones(len(cells.block), np.bool_)
        possible = self._grid.possible_buckets(self._tables.blocks.zones, slice(start, stop))
        block = cells.block - start
        alike = possible.all_alike(self._classes, block, cells.code)
        code = cells.code * self._grid.num_buckets + possible.one_of_each()[block]
        return replace(cells, code=code), alike

    def _evaluate_zones(
        self, cells: HistogramCells, unclear: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return `may_match` and `must_match` of the `unclear` cells, from the zones of their blocks."""
        # A zone covers all samples of a block, so it covers those of each of the block's cells.
        block = cells.block[unclear]
        zones = self._tables.blocks.zones
        numbers = self._predicate.numbers
        entries = Entries(
            combos=self._tables.combos,
            combo=cells.code[unclear],
            low={name: zones[name].low[block] for name in numbers},
            high={name: zones[name].high[block] for name in numbers},
            has_null={name: zones[name].has_null[block] for name in numbers},
        )
        mask = self._predicate.evaluate(entries)
        return mask.may_match, mask.must_match

    def _scan_blocks(self, blocks: NDArray[np.int32]) -> Iterator[HistogramCells]:
        """Read the samples of `blocks`, some blocks at a time, and yield their cells. Adds them to `pruning`."""
        combos = self._tables.combos
        rows_per_block = self._tables.blocks.rows[blocks]
        self.pruning.scanned_blocks += len(blocks)
        # One counter per (block, combo, bucket) is allocated below.
        num_codes = self._classes.size
        max_blocks = max(COUNTERS_PER_READ // num_codes, 1)
        for batch in _cut_into_reads(rows_per_block, max_blocks):
            columns = self._read_samples(blocks[batch])
            entries = Entries.of_samples(combos, columns.combo, columns.numbers)
            readable = columns.combo != combos.bad
            selected = self._predicate.evaluate(entries).must_match & readable
            self.pruning.scanned_samples += int(np.count_nonzero(readable))

            # Number the cells of these blocks as block × num_codes + code, and count the selected samples of each.
            bucket = self._grid.buckets_of_samples(columns.numbers, len(columns.combo))
            block_number = np.repeat(np.arange(len(blocks[batch])), rows_per_block[batch])
            code = columns.combo * np.int64(self._grid.num_buckets) + bucket
            cell = (block_number * num_codes + code)[selected]
            num_cells = len(blocks[batch]) * num_codes
            rows = np.bincount(cell, minlength=num_cells)
            tokens = np.bincount(cell, columns.tokens[selected], num_cells)
            occupied = np.flatnonzero(rows)
            block, code = np.divmod(occupied, num_codes)
            yield HistogramCells(blocks[batch][block], code, rows[occupied], tokens[occupied].astype(np.int64))


def _any_sample_of_each_combo(tables: IndexTables, predicate: Predicate) -> Entries:
    """Return one entry per combo, with numbers of any value."""
    num_combos = tables.combos.num_combos
    infinity = np.full(num_combos, np.inf)
    return Entries(
        combos=tables.combos,
        combo=np.arange(num_combos),
        low=dict.fromkeys(predicate.numbers, -infinity),
        high=dict.fromkeys(predicate.numbers, infinity),
        has_null=dict.fromkeys(predicate.numbers, np.ones(num_combos, np.bool_)),
    )


def _block_ranges(indptr: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges of blocks with `CELLS_PER_RANGE` cells or a few more."""
    num_blocks = len(indptr) - 1
    # Cut at the first block border at or after every multiple of CELLS_PER_RANGE cells.
    targets = np.arange(CELLS_PER_RANGE, int(indptr[-1]), CELLS_PER_RANGE)
    borders = np.unique([0, *np.searchsorted(indptr, targets).tolist(), num_blocks])
    return pairwise(borders.tolist())


def _cut_into_reads(rows: NDArray[np.int32], max_blocks: int) -> Iterator[slice]:
    """Yield slices of blocks with up to `SAMPLES_PER_READ` rows and `max_blocks` blocks; at least one block each."""
    ends = np.cumsum(rows, dtype=np.int64)
    start = 0
    while start < len(rows):
        rows_before = ends[start - 1] if start else 0
        # At least one block, even if it has more rows than one read should have.
        stop = int(np.searchsorted(ends, rows_before + SAMPLES_PER_READ, side="right"))
        stop = max(start + 1, min(stop, start + max_blocks))
        yield slice(start, stop)
        start = stop


def _count_distinct(ascending: NDArray[Any]) -> int:
    """Return the number of distinct values."""
    if not len(ascending):
        return 0
    return int(np.count_nonzero(ascending[1:] != ascending[:-1])) + 1


def _merge_by_block(groups: list[HistogramCells]) -> HistogramCells:
    """Concatenate groups of cells and sort them by block."""
    # Every group is sorted by block already, but their blocks interleave.
    block = np.concatenate([cells.block for cells in groups])
    order = np.argsort(block, kind="stable")
    return HistogramCells(
        block=block[order],
        code=np.concatenate([cells.code for cells in groups])[order],
        rows=np.concatenate([cells.rows for cells in groups])[order],
        tokens=np.concatenate([cells.tokens for cells in groups])[order],
    )
