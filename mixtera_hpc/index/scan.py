"""One unit of a shard → everything the index will say of it, in local numbers that the merge translates.

A unit's part depends on nothing but the unit, so any rank may scan it, at any time, and a part found again after a kill is as
good as new.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.columns import Categories
from mixtera_hpc.formats.format import Batch, Fields, Unit
from mixtera_hpc.formats.scan import ShardFile, scan_shard
from mixtera_hpc.index.discover import Shard, fingerprint_of_shard
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["Combo", "ScanJob", "UnitPart", "scan_unit"]

Combo = tuple[tuple[str, ...], ...]
"""The values of every categorical property, properties sorted by name."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanJob:
    """What is the same for all units of a build."""

    root: Path
    fields: Fields
    block_rows: int
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """The rows of one unit, summed up and listed."""

    fingerprint: str
    """Of the shard, when this is its first unit."""
    combos: list[Combo]
    """The combos that occur; all codes below are positions in it."""
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

    @property
    def num_rows(self) -> int:
        return len(self.samples["combo"])


def scan_unit(job: ScanJob, shard: Shard, unit: Unit) -> UnitPart:
    """Read one unit.

    Raises:
        DataError: rows that cannot be read, the first ten named in its notes; or the file is not the one discovered.
    """
    path, rows = job.root / shard.path, _Rows(job)
    try:
        fingerprint = fingerprint_of_shard(path, shard.size_bytes) if unit.start == 0 else ""
        file = ShardFile(root=job.root, path=shard.path, format=shard.format)
        for batch in scan_shard(file, unit, job.fields, job.block_rows):
            if batch.bad:
                raise DataError("data.on_bad_sample=skip is not available yet.")
            rows.add(batch)
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if (status.st_size, status.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
        raise DataError(
            f"{path} changed while it was being indexed.\n  Build again when nothing writes to it any more."
        )
    return rows.part(fingerprint)


class _Rows:
    """Collects the batches of one unit: some dozen bytes per row, no texts."""

    def __init__(self, job: ScanJob) -> None:
        self._job = job
        kinds = {f.name: f.kind for f in job.fields.properties}
        self._categorical = [name for name, kind in kinds.items() if kind is not Kind.NUMBER]
        self._numbers: dict[str, list[NDArray[np.float64]]] = {n: [] for n, k in kinds.items() if k is Kind.NUMBER}
        self._codes: defaultdict[Combo, int] = defaultdict(count().__next__)
        self._samples: dict[str, list[Ints]] = {"combo": [], "length": [], "tokens": []}
        self._blocks: list[NDArray[np.int64]] = []

    def add(self, batch: Batch) -> None:
        ranges = batch.blocks
        self._blocks.append(np.stack([ranges.offset, ranges.length, ranges.rows]))
        if not batch.rows:
            return
        self._samples["combo"].append(self._combos(batch))
        for name, found in self._numbers.items():
            column = batch.columns[name]
            found.append(column if isinstance(column, np.ndarray) else column.code.astype(np.float64))
        if batch.lengths is not None:
            self._samples["length"].append(batch.lengths)
        if self._job.tokenizer is not None:
            counts = batch.tokens
            if counts is None:
                counts = np.diff(self._job.tokenizer.encode_batch(batch.documents or [])[1])
            self._samples["tokens"].append(counts)

    def part(self, fingerprint: str) -> UnitPart:
        offset, length, rows = np.concatenate(self._blocks, axis=1) if self._blocks else np.zeros((3, 0), np.int64)
        samples = {n: np.concatenate(c) for n, c in self._samples.items() if c}
        samples.setdefault("combo", np.zeros(0, np.int64))
        numbers = {n: np.concatenate([np.zeros(0), *c]) for n, c in self._numbers.items()}
        if rows.sum() != len(samples["combo"]):
            raise DataError(f"A format returned {rows.sum()} rows in blocks, but {len(samples['combo'])} rows in all.")
        block_of_row = np.repeat(np.arange(len(rows)), rows)
        per_block, cells = _histogram(block_of_row, len(rows), len(self._codes), samples)
        return UnitPart(
            fingerprint=fingerprint,
            combos=list(self._codes),
            blocks={"offset": offset, "length": length, "rows": rows, "count": per_block},
            cells=cells,
            zones={n: _zones(values, np.cumsum(rows) - rows) for n, values in numbers.items()},
            samples=samples,
            numbers=numbers,
        )

    def _combos(self, batch: Batch) -> Ints:
        """The unit's code of every row's combo."""
        columns = [batch.columns[name] for name in self._categorical]
        values, code = _joined([c for c in columns if isinstance(c, Categories)], batch.rows)
        codes = np.fromiter((self._codes[v] for v in values), np.int64, len(values))
        return codes[code]


def _joined(columns: Sequence[Categories], rows: int) -> tuple[list[Combo], NDArray[np.intp]]:
    """The distinct combos of several columns and each row's position among them."""
    combos: list[Combo] = [()]
    code = np.zeros(rows, np.intp)
    for column in columns:
        pairs, code = np.unique(code * len(column.values) + column.code, return_inverse=True)
        before, value = np.divmod(pairs, len(column.values))
        combos = [(*combos[b], column.values[v]) for b, v in zip(before.tolist(), value.tolist(), strict=True)]
    return combos, code


def _histogram(
    block: NDArray[np.intp], num_blocks: int, num_combos: int, samples: dict[str, Ints]
) -> tuple[Ints, dict[str, Ints]]:
    """Combos per block, and rows and tokens of every (block, combo) that occurs."""
    cell, inverse = np.unique(block * max(num_combos, 1) + samples["combo"], return_inverse=True)
    cell_block, combo = np.divmod(cell, max(num_combos, 1))
    tokens = np.zeros(len(cell), np.int64)
    if "tokens" in samples:
        np.add.at(tokens, inverse, samples["tokens"])
    rows = np.bincount(inverse, minlength=len(cell))
    return np.bincount(cell_block, minlength=num_blocks), {"combo": combo, "rows": rows, "tokens": tokens}


def _zones(values: NDArray[np.float64], starts: Ints) -> dict[str, NDArray[np.float64]]:
    """Smallest and largest value of each block, nulls aside, and whether it has a null."""
    if not len(starts):
        return {name: np.zeros(0) for name in ("low", "high", "has_null")}
    return {
        "low": np.fmin.reduceat(values, starts),
        "high": np.fmax.reduceat(values, starts),
        "has_null": np.logical_or.reduceat(np.isnan(values), starts).astype(np.float64),
    }
