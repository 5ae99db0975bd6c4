"""Rows that follow each other in a shard, summed up per block and listed: what scans make and the merge puts together.

Combos are numbered inside the part; the merge translates. Rows that cannot be read have the combo None: they keep their place
in the columns and count in no histogram.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.category_codes import Categories

__all__ = ["Combo", "ScanResult", "ScanSummary", "combine_columns", "histogram_of", "reason_of", "zones_of"]

Combo = tuple[tuple[str, ...], ...]
"""The values of every categorical property, properties sorted by name."""
Ints = NDArray[np.int64]

_PLACE = re.compile(
    r"\s*\(byte \d+\)|\s*0x[0-9a-f]+ in position \d+(?:-\d+)?|\s*in position \d+(?:-\d+)?"
    r"|(?<=^sample )'.*?' (?=has )|(?<=^member ).*?(?=\.[^./\s]+: )",
    re.DOTALL,
)
MAX_REASON = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSummary:
    """What the merge needs to know of a part before it loads it."""

    combos: list[Combo | None]
    """Those that occur."""
    rows: int
    bad_rows: int
    blocks: int
    cells: int
    block_rows: dict[int, int]
    """Rows of a block → blocks that have so many."""
    maxima: dict[str, int]
    """Largest value of every integer array, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """Some blocks of one shard."""

    combos: list[Combo | None]
    """The combos that occur; all codes below are positions in it. None stands for rows that cannot be read."""
    blocks: dict[str, Ints]
    """`offset`, `length`, `rows` of every block; and `count`, its number of combos."""
    cells: dict[str, Ints]
    """`combo`, `rows`, `tokens`: for each block in turn, its combos ascending."""
    zones: dict[str, dict[str, NDArray[np.float64]]]
    """Per number: `low`, `high` (NaN where all are null) and `has_null` of every block."""
    samples: dict[str, Ints]
    """`combo`, and where there are any `length` and `tokens` of every row."""
    numbers: dict[str, NDArray[np.float64]]
    """Per number, of every row; null is NaN."""
    fingerprint: str = ""
    """Of the shard, when this is its first part."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why rows cannot be read → how many; 0 stands for a damaged end, whose rows nobody can count."""

    @property
    def num_rows(self) -> int:
        return len(self.samples["combo"])

    def summary(self) -> ScanSummary:
        """What there is in it."""
        rows, numbers = np.unique(self.blocks["rows"], return_counts=True)
        groups = {"blocks": self.blocks, "cells": self.cells, "samples": self.samples}
        return ScanSummary(
            combos=self.combos,
            rows=self.num_rows,
            bad_rows=self.num_rows - int(self.cells["rows"].sum()),
            blocks=len(self.blocks["rows"]),
            cells=len(self.cells["combo"]),
            block_rows=dict(zip(rows.tolist(), numbers.tolist(), strict=True)),
            maxima={f"{g}/{name}": int(v.max(initial=0)) for g, arrays in groups.items() for name, v in arrays.items()},
        )


def combine_columns(columns: Sequence[Categories], rows: int) -> tuple[list[Combo], NDArray[np.intp]]:
    """Distinct combos of several columns, those that occur and perhaps others, and each row's position among them."""
    if not columns:
        return [()], np.zeros(rows, np.intp)
    first, *others = columns
    combos: list[Combo] = [(values,) for values in first.values]
    code = first.code.astype(np.intp)
    for column in others:
        pairs, code = np.unique(code * len(column.values) + column.code, return_inverse=True)
        before, value = np.divmod(pairs, len(column.values))
        combos = [(*combos[b], column.values[v]) for b, v in zip(before.tolist(), value.tolist(), strict=True)]
    return combos, code


def histogram_of(
    rows: Ints, samples: dict[str, Ints], num_combos: int, bad: int | None
) -> tuple[Ints, dict[str, Ints]]:
    """Combos per block, and rows and tokens of every (block, combo) that occurs, combo `bad` left out."""
    block, combo = np.repeat(np.arange(len(rows)), rows), samples["combo"]
    tokens = samples.get("tokens")
    if bad is not None:
        good = combo != bad
        block, combo, tokens = block[good], combo[good], None if tokens is None else tokens[good]
    num_combos = max(num_combos, 1)
    cell, counts, sums = _added_up(block * num_combos + combo, len(rows) * num_combos, tokens)
    cell_block, cell_combo = np.divmod(cell, num_combos)
    return np.bincount(cell_block, minlength=len(rows)), {"combo": cell_combo, "rows": counts, "tokens": sums}


def _added_up(key: Ints, num_keys: int, values: Ints | None) -> tuple[Ints, Ints, Ints]:
    """The keys that occur, ascending, how often, and the sum of their values; sorts only where keys are thinly spread."""
    if values is None:
        values = np.zeros(len(key), np.int64)
    if num_keys <= 4 * len(key):
        counts = np.bincount(key, minlength=num_keys)
        found = np.flatnonzero(counts)
        counts, sums = counts[found], np.bincount(key, values, num_keys)[found]
    else:
        found, position, counts = np.unique(key, return_inverse=True, return_counts=True)
        sums = np.bincount(position, values, len(found))
    return found, counts, sums.astype(np.int64)  # Exact below 2^53.


def zones_of(values: NDArray[np.float64], rows: Ints, is_bad: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Smallest and largest value of each block, nulls aside, and whether it has a null; rows that are bad have none."""
    if not len(rows):
        return {name: np.zeros(0) for name in ("low", "high", "has_null")}
    starts = np.cumsum(rows) - rows
    return {
        "low": np.fmin.reduceat(values, starts),
        "high": np.fmax.reduceat(values, starts),
        "has_null": np.logical_or.reduceat(np.isnan(values) & ~is_bad, starts).astype(np.float64),
    }


def reason_of(problem: str) -> str:
    """A problem without the place where it was met, or the name of the sample, so that equal ones count together."""
    return _PLACE.sub("", problem)[:MAX_REASON]
