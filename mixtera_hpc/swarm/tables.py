"""`ratios.csv` and `metrics.csv`: the mixture and the losses of every proxy, one row each.

Both have a column `run` (or `run_id`); a column `name` or `index` is ignored, and all other columns hold numbers. This
is the format of Olmix, so tables of other tools can be used here, and those written here by other tools. An empty cell
of `metrics.csv` is a metric that a proxy does not have.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError, did_you_mean
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["SwarmTable", "check_ratios", "join_tables", "read_table", "table_text"]

ID_COLUMNS = ("run", "run_id")
IGNORED_COLUMNS = ("", "name", "index")
SUM_TOLERANCE = 1e-3
"""Shares of a row may sum to 1 within this: tables of other tools are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmTable:
    """Numbers of runs; NaN stands for an empty cell."""

    runs: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    """Shape (runs, columns)."""

    def rows_of(self, runs: Sequence[str]) -> NDArray[np.float64]:
        """Return the rows of some runs, in their order; shape (len(runs), columns)."""
        row_of = {run: row for row, run in enumerate(self.runs)}
        return self.values[[row_of[run] for run in runs]]


def read_table(path: Path) -> SwarmTable:
    """Read `ratios.csv` or `metrics.csv`.

    Raises:
        DataError: the file is missing or damaged, a cell is not a number, or a run occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}.\n  Give a CSV file with a column `run`.") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    ids = [column for column, name in enumerate(header) if name in ID_COLUMNS]
    if len(ids) != 1 or len(set(header)) < len(header):
        raise DataError(
            f"The header of {path} is {','.join(header)[:100]!r}, expected one column `run` (or `run_id`), and a "
            "different name for every column.\n  Add the column, or rename columns."
        )
    used = [column for column, name in enumerate(header) if column != ids[0] and name not in IGNORED_COLUMNS]
    runs = []
    values = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path} line {number} has {len(row)} cells, expected {len(header)}.\n  Fix the line.")
        runs.append(row[ids[0]].strip())
        values.append([_number(path, number, header[column], row[column]) for column in used])
    _check_runs(path, runs)
    array = np.array(values, np.float64).reshape(len(runs), len(used))
    return SwarmTable(runs=tuple(runs), columns=tuple(header[column] for column in used), values=array)


def table_text(table: SwarmTable) -> str:
    """Return the table as CSV, such that `read_table` returns it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *table.columns])
    for run, row in zip(table.runs, table.values.tolist(), strict=True):
        writer.writerow([run, *("" if math.isnan(value) else repr(value) for value in row)])
    return text.getvalue()


def join_tables(tables: Sequence[SwarmTable], columns: Sequence[str], missing: float) -> SwarmTable:
    """Return the rows of all tables under `columns`; a table without a column has `missing` there."""
    blocks = []
    for table in tables:
        place: Mapping[str, int] = {name: i for i, name in enumerate(table.columns)}
        block = np.full((len(table.runs), len(columns)), missing)
        for target, name in enumerate(columns):
            if name in place:
                block[:, target] = table.values[:, place[name]]
        blocks.append(block)
    runs = tuple(run for table in tables for run in table.runs)
    values = np.concatenate(blocks) if blocks else np.zeros((0, len(columns)))
    return SwarmTable(runs=runs, columns=tuple(columns), values=values)


def check_ratios(path: Path, table: SwarmTable, names: Sequence[str], num_phases: int = 1) -> SwarmTable:
    """Return the table with the columns `names`, and rows of sum 1 in every phase; absent columns are 0.

    Raises:
        DataError: a column is not a domain, or the shares of a run are invalid.
    """
    for column in table.columns:
        if column not in names:
            raise DataError(
                f"{path} has a column {column!r}, which is not a domain of this swarm."
                f"{did_you_mean(column, list(names))}\n  The domains are {', '.join(names[:10])}. Rename the column."
            )
    ratios = join_tables([table], names, 0.0)
    shares = by_phase(ratios.values, num_phases)
    sums = shares.sum(axis=2)
    wrong = ~(np.abs(sums - 1) <= SUM_TOLERANCE).all(axis=1) | (ratios.values < 0).any(axis=1)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{path}: the shares of run {ratios.runs[first]!r} are {ratios.values[first].tolist()[:10]}, expected "
            f"numbers of at least 0 that sum to 1{' in every phase' if num_phases > 1 else ''}.\n  Fix the row."
        )
    scaled = (shares / sums[:, :, None]).reshape(ratios.values.shape)
    return SwarmTable(runs=ratios.runs, columns=ratios.columns, values=scaled)


def _number(path: Path, line: int, column: str, cell: str) -> float:
    """Return the number in a cell; NaN for an empty one."""
    if not cell.strip():
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{path} line {line} has {cell.strip()[:40]!r} in column {column!r}, expected a finite number or nothing.\n"
            "  Fix the cell, or leave it empty."
        )
    return value


def _check_runs(path: Path, runs: Sequence[str]) -> None:
    twice = sorted({run for run in runs if runs.count(run) > 1}) if len(set(runs)) < len(runs) else []
    if twice or "" in runs:
        name = twice[0] if twice else ""
        raise DataError(
            f"{path} has two rows of run {name!r}, or a row without one.\n  Give every row a name of its own."
        )
