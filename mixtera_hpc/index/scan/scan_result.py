"""Hold the result of scanning consecutive rows of a shard: per-block summaries and per-sample columns.

Combos are numbered within one result; the merge translates them to the numbers of the index. Rows that cannot be read
have the combo None. They keep their position in the columns and are in no histogram.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.index.layout import SIZE_NUMBERS
from mixtera_hpc.index.scan.token_spool import SpooledTokens

__all__ = [
    "Combo",
    "ScanResult",
    "ScanSummary",
    "combine_columns",
    "histogram_of",
    "reason_of",
    "size_numbers",
    "zones_of",
]

Combo = tuple[tuple[str, ...], ...]
"""The values of every categorical property, properties sorted by name."""
Ints = NDArray[np.int64]

# Byte offsets, code points and member names: what differs between rows with the same problem.
_PLACE = re.compile(
    r"\s*\(byte \d+\)|\s*0x[0-9a-f]+ in position \d+(?:-\d+)?|\s*in position \d+(?:-\d+)?"
    r"|(?<=^sample )'.*?' (?=has )|(?<=^member ).*?(?=\.[^./\s]+: )",
    re.DOTALL,
)
MAX_REASON = 120
"""Characters of a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSummary:
    """Facts about a result that the merge needs before it loads the columns."""

    combos: list[Combo | None]
    """The combos that occur."""
    rows: int
    bad_rows: int
    blocks: int
    cells: int
    block_rows: dict[int, int]
    """Rows per block → number of blocks with that many rows."""
    maxima: dict[str, int]
    """Largest value of every integer array, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """Some consecutive blocks of one shard."""

    combos: list[Combo | None]
    """The combos that occur; all combo codes below are positions in this list. None stands for rows that cannot be
    read."""
    blocks: dict[str, Ints]
    """Per block: `offset`, `length`, `rows`, and `count`, the number of its combos."""
    cells: dict[str, Ints]
    """Per (block, combo) pair: `combo`, `rows`, `tokens`; sorted by block, then combo."""
    zones: dict[str, dict[str, NDArray[np.float64]]]
    """Per number property and block: `low`, `high` (NaN if all are null) and `has_null`."""
    samples: dict[str, Ints]
    """Per row: `combo`, and `length` and `tokens` if the format and the tokenizer give them."""
    numbers: dict[str, NDArray[np.float64]]
    """Per number property and row; NaN for null."""
    fingerprint: str = ""
    """Fingerprint of the shard, if this is its first result; else empty."""
    path_forms: dict[str, list[int]] = field(default_factory=dict)
    """Dotted path → the forms of it that have values in the unit, up to here."""
    spooled: SpooledTokens | None = None
    """The place of the token ids, if they are kept."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason for which rows cannot be read → their number; 0 for a damaged end, whose rows cannot be counted."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows, including those that cannot be read."""
        return len(self.samples["combo"])

    def summary(self) -> ScanSummary:
        """Return what the merge needs to know first."""
        # Blocks have few different sizes, so this dict is far shorter than the list of blocks.
        sizes, counts = np.unique(self.blocks["rows"], return_counts=True)
        groups = {"blocks": self.blocks, "cells": self.cells, "samples": self.samples}
        maxima = {
            f"{group}/{name}": int(values.max(initial=0))
            for group, arrays in groups.items()
            for name, values in arrays.items()
        }
        return ScanSummary(
            combos=self.combos,
            rows=self.num_rows,
            bad_rows=self.num_rows - int(self.cells["rows"].sum()),
            blocks=len(self.blocks["rows"]),
            cells=len(self.cells["combo"]),
            block_rows=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
            maxima=maxima,
        )


def combine_columns(columns: Sequence[Categories], rows: int) -> tuple[list[Combo], NDArray[np.intp]]:
    """Combine categorical columns into one column of combos.

    Returns:
        The distinct combos (some may occur in no row), and for each row the position of its combo.
    """
    if not columns:
        return [()], np.zeros(rows, np.intp)
    first, *others = columns
    # Start with one-element combos of the first column.
    combos: list[Combo] = [(values,) for values in first.values]
    code = first.code.astype(np.intp)
    for column in others:
        # Append one column: number the (combo so far, value) pairs that occur, so the list never exceeds the rows.
        num_values = len(column.values)
        pairs, code = np.unique(code * num_values + column.code, return_inverse=True)
        prefixes, values = np.divmod(pairs, num_values)
        combos = [
            (*combos[prefix], column.values[value])
            for prefix, value in zip(prefixes.tolist(), values.tolist(), strict=True)
        ]
    return combos, code


def histogram_of(
    rows: Ints, samples: dict[str, Ints], num_combos: int, bad: int | None
) -> tuple[Ints, dict[str, Ints]]:
    """Count rows and tokens of every (block, combo) pair that occurs.

    Args:
        rows: of every block.
        samples: the columns `combo` and, if counted, `tokens`.
        num_combos: of all samples.
        bad: the combo of rows that cannot be read, which is not counted; None without such rows.

    Returns:
        The number of combos per block; and the columns `combo`, `rows`, `tokens` of all cells, sorted by block, then
        combo.
    """
    # Block and combo of every row.
    block = np.repeat(np.arange(len(rows)), rows)
    combo = samples["combo"]
    tokens = samples.get("tokens", np.zeros(len(combo), np.int64))
    if bad is not None:
        is_good = combo != bad
        block = block[is_good]
        combo = combo[is_good]
        tokens = tokens[is_good]

    # Sum by one integer key per cell; keys ascend by block, then combo.
    num_combos = max(num_combos, 1)
    cell, counts, sums = _sum_by_key(block * num_combos + combo, len(rows) * num_combos, tokens)
    cell_block, cell_combo = np.divmod(cell, num_combos)
    combos_per_block = np.bincount(cell_block, minlength=len(rows))
    return combos_per_block, {"combo": cell_combo, "rows": counts, "tokens": sums}


def _sum_by_key(key: Ints, num_keys: int, values: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the keys that occur, ascending; how often each occurs; and the sum of its values.

    Counting all possible keys takes O(num_keys), sorting O(n log n): sort only if most keys do not occur. The sums are
    float64 inside `bincount`, exact below 2^53.
    """
    if num_keys <= 4 * len(key):
        counts = np.bincount(key, minlength=num_keys)
        occurring = np.flatnonzero(counts)
        sums = np.bincount(key, values, num_keys)[occurring]
        return occurring, counts[occurring], sums.astype(np.int64)
    occurring, position, counts = np.unique(key, return_inverse=True, return_counts=True)
    sums = np.bincount(position, values, len(occurring))
    return occurring, counts, sums.astype(np.int64)


def zones_of(values: NDArray[np.float64], rows: Ints, is_bad: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Return the smallest and largest value of each block without nulls, and whether it has a null.

    Args:
        values: of every row; NaN for null.
        rows: of every block.
        is_bad: which rows cannot be read; they do not count as null.
    """
    if not len(rows):
        return {name: np.zeros(0) for name in ("low", "high", "has_null")}
    # First row of every block.
    starts = np.cumsum(rows) - rows
    # fmin and fmax ignore NaN unless all values of the block are NaN.
    return {
        "low": np.fmin.reduceat(values, starts),
        "high": np.fmax.reduceat(values, starts),
        "has_null": np.logical_or.reduceat(np.isnan(values) & ~is_bad, starts).astype(np.float64),
    }


def size_numbers(samples: Mapping[str, Ints]) -> dict[str, NDArray[np.float64]]:
    """Return the built-in numbers of samples, by name; null where a row has no byte range of its own."""
    numbers = {name: samples[column].astype(np.float64) for name, column in SIZE_NUMBERS.items() if column in samples}
    if "bytes" in numbers:
        numbers["bytes"][numbers["bytes"] == 0] = np.nan
    return numbers


def reason_of(problem: str) -> str:
    """Return a problem without byte positions and sample names, so that equal problems are counted together."""
    return _PLACE.sub("", problem)[:MAX_REASON]
