"""Sum the rows and tokens of the selected cells by domain and block, a range of the histogram at a time.

Memory is that of the result plus a few megabytes, regardless of the size of the index.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_assignment import NO_DOMAIN, DomainAssignment
from mixtera_hpc.core.index_tables import DomainTable
from mixtera_hpc.core.query.cell_selection import HistogramCells

__all__ = ["DomainCounts", "count_domains"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCounts:
    """The result of counting the domains of a query."""

    table: DomainTable
    unassigned: tuple[int, int]
    """Selected rows and tokens that belong to no domain."""
    rows_of_bucket: NDArray[np.int64]
    """Selected rows of every (combo, bucket), or zeros if they were not requested; shape (num_combos, num_buckets). The
    rows of buckets of one class may be counted in any one of them."""


@dataclass(frozen=True, slots=True)
class _RangeCounts:
    """The counts of a range of blocks: entries sorted by domain, then block."""

    block: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]
    entries_per_domain: NDArray[np.int64]
    """Shape (num_domains,)."""


def count_domains(
    ranges: Iterable[HistogramCells], assignment: DomainAssignment, num_domains: int, *, per_bucket: bool
) -> DomainCounts:
    """Count the rows and tokens of every domain in every block.

    Args:
        ranges: the selected cells of one range of blocks after the other; see `CellSelector.ranges`.
        assignment: the domain of every combo and bucket.
        num_domains: K.
        per_bucket: also count the rows of every combo and bucket.
    """
    domain_of_code = assignment.domain.reshape(-1)
    # 16 bits, where they are enough, let numpy sort by domain with a radix sort.
    domain_of_code = domain_of_code.astype(np.int16 if int(domain_of_code.max(initial=0)) < 1 << 15 else np.int32)
    rows_of_bucket = np.zeros(domain_of_code.size, np.int64)
    unassigned = np.zeros(2, np.int64)
    counts = []
    for cells in ranges:
        if per_bucket:
            # bincount sums in float64, which is exact below 2^53 rows. A range has fewer.
            rows_of_bucket += np.bincount(cells.code, cells.rows, len(rows_of_bucket)).astype(np.int64)

        domain = domain_of_code.take(cells.code)
        in_domain = domain != NO_DOMAIN
        if not in_domain.all():
            outside = cells.select(~in_domain)
            unassigned += outside.rows.sum(dtype=np.int64), outside.tokens.sum(dtype=np.int64)
            cells = cells.select(in_domain)
            domain = domain[in_domain]
        counts.append(_sum_by_domain(cells, domain, num_domains))

    unassigned_rows, unassigned_tokens = unassigned.tolist()
    return DomainCounts(
        table=_concatenate_ranges(counts, num_domains),
        unassigned=(unassigned_rows, unassigned_tokens),
        rows_of_bucket=rows_of_bucket.reshape(assignment.domain.shape),
    )


def _sum_by_domain(cells: HistogramCells, domain: NDArray[Any], num_domains: int) -> _RangeCounts:
    """Sum the cells that have the same domain and block.

    Args:
        cells: with ascending blocks.
        domain: of every cell; shape (num_cells,).
        num_domains: K.
    """
    block = cells.block
    rows = cells.rows
    tokens = cells.tokens
    if (domain[1:] < domain[:-1]).any():
        order = np.argsort(domain, kind="stable")
        domain = domain[order]
        block = block[order]
        rows = rows[order]
        tokens = tokens[order]

    # Cells of one (domain, block) pair are now neighbours. Each run of them becomes one entry.
    differs = (domain[1:] != domain[:-1]) | (block[1:] != block[:-1])
    run_start = np.flatnonzero(np.r_[True, differs][: len(domain)])
    return _RangeCounts(
        block=block[run_start],
        rows=_sum_runs(rows, run_start, np.int32),
        tokens=_sum_runs(tokens, run_start, np.int64),
        entries_per_domain=np.bincount(domain[run_start], minlength=num_domains),
    )


def _sum_runs(values: NDArray[Any], run_start: NDArray[np.intp], dtype: Any) -> NDArray[Any]:
    """Return the sum of each run of `values`; a run ends where the next one starts."""
    if not len(run_start):
        return np.zeros(0, dtype)
    return np.add.reduceat(values, run_start, dtype=dtype)


def _concatenate_ranges(ranges: list[_RangeCounts], num_domains: int) -> DomainTable:
    """Bring the entries of every domain together; blocks stay ascending, as they are in `ranges`.

    Empties `ranges`, so that each of them is freed as soon as it is copied.
    """
    entries = np.array([r.entries_per_domain for r in ranges], np.int64).reshape(len(ranges), num_domains)
    indptr = np.concatenate([[0], np.cumsum(entries.sum(axis=0))]).astype(np.int64)
    block = np.empty(indptr[-1], np.int32)
    rows = np.empty(indptr[-1], np.int32)
    tokens = np.empty(indptr[-1], np.int64)

    next_free = indptr[:-1].copy()
    for per_domain in entries:
        counts = ranges.pop(0)
        # Entry i of the range moves by the distance between its domain's place in the table and in the range.
        start_in_range = np.cumsum(per_domain) - per_domain
        target = np.repeat(next_free - start_in_range, per_domain) + np.arange(len(counts.block))
        block[target] = counts.block
        rows[target] = counts.rows
        tokens[target] = counts.tokens
        next_free += per_domain
    return DomainTable(indptr=indptr, block=block, rows=rows, tokens=tokens)
