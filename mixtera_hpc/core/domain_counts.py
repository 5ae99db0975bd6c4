"""Rows and tokens of every domain in every block, a range of the histogram at a time.

What a combo decides is decided once per combo; cells that need numbers look at their block's zones; blocks that even those
leave open have their samples read, many blocks at once. Memory is that of the answer plus some megabytes, whatever the index.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import IndexTables, SampleColumns
from mixtera_hpc.core.query import Entries, Predicate

__all__ = ["NO_DOMAIN", "DomainCounter", "DomainTable", "PruningStatistics", "ReadBlocks"]

NO_DOMAIN = -1
"""Selected, and in no domain."""
CELLS_TOGETHER = 1 << 18
"""Cells of the histogram that are looked at together: their columns stay in a core's cache."""
SAMPLES_TOGETHER = 1 << 17
"""Samples read together, at least one block's."""
COUNTERS_TOGETHER = 1 << 21
"""Bound on blocks × combos while samples are counted."""

ReadBlocks = Callable[[NDArray[np.int32]], SampleColumns]
"""Reads the samples of some blocks, one block after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTable:
    """The blocks of every domain and what they hold of it.

    Entries of domain d are `indptr[d]:indptr[d + 1]`, blocks ascending; a block may belong to several domains.
    """

    indptr: NDArray[np.int64]
    """Shape (num_domains + 1,)."""
    block: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]
    """Without special tokens."""

    @property
    def num_domains(self) -> int:
        return len(self.indptr) - 1

    def totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and tokens of every domain; shape (num_domains,) each."""
        slices = [slice(a, b) for a, b in pairwise(self.indptr.tolist())]
        rows = [self.rows[s].sum(dtype=np.int64) for s in slices]
        tokens = [self.tokens[s].sum(dtype=np.int64) for s in slices]
        return np.array(rows, np.int64), np.array(tokens, np.int64)


@dataclass(slots=True, kw_only=True)
class PruningStatistics:
    """What an answer cost. Every block is in exactly one of the four counts of blocks."""

    pruned_by_histogram: int = 0
    """Blocks that no combo of theirs lets match."""
    pruned_by_zones: int = 0
    """Blocks that only their smallest and largest numbers rule out."""
    decided_whole: int = 0
    """Blocks of which combos and zones decide every cell."""
    scanned_blocks: int = 0
    """Blocks whose samples had to be looked at."""
    scanned_samples: int = 0
    """Samples in the scanned blocks; rows that cannot be read are none."""

    @property
    def blocks(self) -> int:
        """All blocks."""
        return self.pruned_by_histogram + self.pruned_by_zones + self.decided_whole + self.scanned_blocks


@dataclass(frozen=True, slots=True)
class _Cells:
    """Some cells of the histogram, blocks ascending."""

    block: NDArray[np.int32]
    combo: NDArray[Any]
    rows: NDArray[Any]
    tokens: NDArray[Any]

    def only(self, keep: NDArray[np.bool_]) -> "_Cells":
        """Some of the cells; no copy when it is all of them."""
        kept = np.flatnonzero(keep)  # Taking positions is six times as fast as taking by a mask.
        if len(kept) == len(keep):
            return self
        return _Cells(*(column.take(kept) for column in (self.block, self.combo, self.rows, self.tokens)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a range of blocks has: entries sorted by domain, then block."""

    block: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]
    per_domain: NDArray[np.int64]
    """Entries of every domain; shape (num_domains,)."""


class DomainCounter:
    """Counts one query's domains."""

    def __init__(
        self,
        tables: IndexTables,
        predicate: Predicate,
        combo_domain: NDArray[np.int32],
        read_blocks: ReadBlocks,
        per_combo: bool = False,
    ) -> None:
        """
        Args:
            per_combo: `rows_of_combo` is wanted.
        """
        self._tables, self._predicate, self._read_blocks = tables, predicate, read_blocks
        self._domain = combo_domain.astype(np.int16 if len(combo_domain) < 1 << 15 else np.int32)
        num_combos = tables.combos.num_combos
        unknown = np.full(num_combos, np.inf)
        anything = Entries(
            combos=tables.combos,
            combo=np.arange(num_combos),
            low=dict.fromkeys(predicate.numbers, -unknown),
            high=dict.fromkeys(predicate.numbers, unknown),
            has_null=dict.fromkeys(predicate.numbers, np.ones(num_combos, np.bool_)),
        )
        mask = predicate.evaluate(anything)
        readable = np.arange(num_combos) != tables.combos.bad
        self._can, self._must = mask.may_match & readable, mask.must_match & readable
        self.pruning = PruningStatistics()
        self._per_combo = per_combo
        self.rows_of_combo = np.zeros(num_combos, np.int64)
        """Rows that the query selects of every combo, where wanted; shape (num_combos,)."""
        self.unassigned = np.zeros(2, np.int64)
        """Rows and tokens that the query selects and that are in no domain."""

    def table(self, num_domains: int) -> DomainTable:
        """Count."""
        pieces = []
        for start, stop in _ranges(self._tables.histogram.indptr):
            cells = self._decided(start, stop)
            if self._per_combo:  # Exact below 2^53 rows, which a range has.
                self.rows_of_combo += np.bincount(cells.combo, cells.rows, len(self._can)).astype(np.int64)
            domain = self._domain.take(cells.combo)
            inside = domain != NO_DOMAIN
            if not inside.all():
                out = cells.only(~inside)
                self.unassigned += out.rows.sum(dtype=np.int64), out.tokens.sum(dtype=np.int64)
                cells, domain = cells.only(inside), domain[inside]
            pieces.append(_piece(cells, domain, num_domains))
        return _joined(pieces, num_domains)

    def _decided(self, start: int, stop: int) -> _Cells:
        """What the query selects of the blocks [start, stop)."""
        histogram = self._tables.histogram
        where = slice(int(histogram.indptr[start]), int(histogram.indptr[stop]))
        count = np.diff(histogram.indptr[start : stop + 1])
        block = np.repeat(np.arange(start, stop, dtype=np.int32), count)
        combo = histogram.combo[where].astype(np.intp)  # What every look-up would make of it.
        cells = _Cells(block, combo, histogram.rows[where], histogram.tokens[where])
        cells = cells.only(self._can.take(cells.combo))
        possible = _distinct(cells.block)
        self.pruning.pruned_by_histogram += stop - start - possible
        if not self._predicate.numbers:
            self.pruning.decided_whole += possible
            return cells
        must = self._must.take(cells.combo)
        can, unclear = must.copy(), ~must
        can[unclear], must[unclear] = self._zoned(cells, unclear)
        undecided = np.unique(cells.block[can & ~must])
        left = _distinct(cells.block[can])
        self.pruning.pruned_by_zones += possible - left
        self.pruning.decided_whole += left - len(undecided)
        if not len(undecided):
            return cells.only(must)
        cells = cells.only(must & ~np.isin(cells.block, undecided))
        return _merged([cells, *self._scanned(undecided)])

    def _zoned(self, cells: _Cells, unclear: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """`may_match` and `must_match` of the cells that need numbers, by the zones of their blocks."""
        block, combo, zones = cells.block[unclear], cells.combo[unclear], self._tables.blocks.zones
        names = self._predicate.numbers
        entries = Entries(
            combos=self._tables.combos,
            combo=combo,
            low={n: zones[n].low[block] for n in names},
            high={n: zones[n].high[block] for n in names},
            has_null={n: zones[n].has_null[block] for n in names},
        )
        mask = self._predicate.evaluate(entries)
        return mask.may_match, mask.must_match

    def _scanned(self, blocks: NDArray[np.int32]) -> Iterator[_Cells]:
        """Count the samples of blocks, some blocks at a time."""
        combos, every_row = self._tables.combos, self._tables.blocks.rows[blocks]
        self.pruning.scanned_blocks += len(blocks)
        at_most = max(COUNTERS_TOGETHER // combos.num_combos, 1)
        for some in _cut(every_row, at_most):
            columns, chosen = self._read_blocks(blocks[some]), blocks[some]
            hit = self._predicate.evaluate(Entries.of_samples(combos, columns.combo, columns.numbers)).must_match
            readable = columns.combo != combos.bad
            self.pruning.scanned_samples += int(np.count_nonzero(readable))
            hit = hit & readable
            cell = np.repeat(np.arange(len(chosen)) * combos.num_combos, every_row[some]) + columns.combo
            rows = np.bincount(cell[hit], minlength=len(chosen) * combos.num_combos)
            found = np.flatnonzero(rows)
            tokens = np.bincount(cell[hit], columns.tokens[hit], len(rows))[found].astype(np.int64)
            block, combo = np.divmod(found, combos.num_combos)
            yield _Cells(chosen[block], combo, rows[found], tokens)


def _ranges(indptr: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that have `CELLS_TOGETHER` cells or a little more."""
    last = len(indptr) - 1
    wanted = np.arange(CELLS_TOGETHER, int(indptr[-1]), CELLS_TOGETHER)
    return pairwise(np.unique([0, *np.searchsorted(indptr, wanted).tolist(), last]).tolist())


def _cut(rows: NDArray[np.int32], at_most: int) -> Iterator[slice]:
    """Slices of blocks of up to `SAMPLES_TOGETHER` rows and `at_most` blocks, at least one."""
    ends, start = np.cumsum(rows, dtype=np.int64), 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + SAMPLES_TOGETHER, side="right"))
        stop = max(start + 1, min(stop, start + at_most))
        yield slice(start, stop)
        start = stop


def _distinct(ascending: NDArray[Any]) -> int:
    """How many different values there are."""
    return int(np.count_nonzero(ascending[1:] != ascending[:-1])) + 1 if len(ascending) else 0


def _merged(parts: list[_Cells]) -> _Cells:
    columns = [
        np.concatenate(column) for column in zip(*((p.block, p.combo, p.rows, p.tokens) for p in parts), strict=True)
    ]
    order = np.argsort(columns[0], kind="stable")
    return _Cells(*(column[order] for column in columns))


def _piece(cells: _Cells, domain: NDArray[Any], num_domains: int) -> _Piece:
    """Add up the cells of one (domain, block)."""
    block, rows, tokens = cells.block, cells.rows, cells.tokens
    if (domain[1:] < domain[:-1]).any():
        order = np.argsort(domain, kind="stable")  # A radix sort, when there are 16 bits.
        domain, block, rows, tokens = domain[order], block[order], rows[order], tokens[order]
    first = np.flatnonzero(np.r_[True, (domain[1:] != domain[:-1]) | (block[1:] != block[:-1])][: len(domain)])
    return _Piece(
        block=block[first],
        rows=_sum_runs(rows, first, np.int32),
        tokens=_sum_runs(tokens, first, np.int64),
        per_domain=np.bincount(domain[first], minlength=num_domains),
    )


def _sum_runs(values: NDArray[Any], first: NDArray[np.intp], dtype: Any) -> NDArray[Any]:
    """Sums of consecutive runs that begin at `first`."""
    return np.add.reduceat(values, first, dtype=dtype) if len(first) else np.zeros(0, dtype)


def _joined(pieces: list[_Piece], num_domains: int) -> DomainTable:
    """Put the entries of every domain together, blocks ascending as the pieces are; a piece is given up when it is placed."""
    per_domain = np.array([piece.per_domain for piece in pieces], np.int64).reshape(len(pieces), num_domains)
    indptr = np.concatenate([[0], np.cumsum(per_domain.sum(axis=0))]).astype(np.int64)
    begin = indptr[:-1].copy()
    block, rows = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.int32)
    tokens = np.empty(indptr[-1], np.int64)
    for counts in per_domain:
        piece = pieces.pop(0)
        at = np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(len(piece.block))
        block[at], rows[at], tokens[at] = piece.block, piece.rows, piece.tokens
        begin += counts
    return DomainTable(indptr=indptr, block=block, rows=rows, tokens=tokens)
