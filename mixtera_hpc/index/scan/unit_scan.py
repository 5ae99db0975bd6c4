"""One unit of a shard → everything the index will say of it, in local numbers that the merge translates.

A unit's parts depend on nothing but the unit, so any rank may scan it, at any time, and a part found again after a kill is as
good as new. A part ends where a block ends and has at most some hundred thousand rows more than the longest block, so memory
does not grow with the unit.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import Column, PropertyField, RowBatch, ScanSpec, ScanUnit
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.shard_scan import ShardFile, scan_shard
from mixtera_hpc.index.build.discover import Shard, fingerprint_of_shard
from mixtera_hpc.index.layout import DATASET
from mixtera_hpc.index.scan.computed_properties import DocumentFunctions
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, combine_columns, histogram_of, reason_of, zones_of
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["ScanSettings", "scan_unit"]

Ints = NDArray[np.int64]
RESULT_ROWS = 1 << 19
IS_BAD = -1
MAX_REASONS = 30
"""Told apart in a part: what a user's function says of a row may be new every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSettings:
    """What is the same for all units of a build."""

    roots: Mapping[str, Path]
    """Dataset → the folder its shards are in; a single one is called ''."""
    fields: ScanSpec
    """What is read from rows."""
    functions: DocumentFunctions
    """What is computed from documents."""
    block_rows: int
    tokenizer: Tokenizer | None

    @property
    def properties(self) -> tuple[PropertyField, ...]:
        """All of them, sorted by name; `dataset` is one when roots have names."""
        built_in = [] if "" in self.roots else [PropertyField(name=DATASET, path="", kind=Kind.CATEGORY)]
        found = (*self.fields.properties, *self.functions.fields, *built_in)
        return tuple(sorted(found, key=lambda field: field.name))


def scan_unit(job: ScanSettings, shard: Shard, unit: ScanUnit) -> Iterator[ScanResult]:
    """Read one unit; its parts, in order, at least one.

    Raises:
        DataError: rows that cannot be read, the first ten named in its notes, unless they are skipped; or the file is not
            the one discovered.
    """
    path, rows = shard.below(job.roots), _RowCollector(job, shard)
    try:
        fingerprint = fingerprint_of_shard(path, shard.size_bytes) if unit.start == 0 else ""
        for batch in _batches(job, shard, unit, rows):
            rows.add(batch)
            if rows.complete >= RESULT_ROWS:
                yield rows.part(fingerprint)
                fingerprint = ""
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.\n  Restore it, or leave it out with data.exclude."
        ) from None
    if (status.st_size, status.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
        raise DataError(
            f"{path} changed while it was being indexed.\n  Build again when nothing writes to it any more."
        )
    if rows.held != rows.complete:
        raise DataError(f"The format of {path} put {rows.complete} rows into blocks, but returned {rows.held}.")
    yield rows.part(fingerprint)


def _batches(job: ScanSettings, shard: Shard, unit: ScanUnit, rows: "_RowCollector") -> Iterator[RowBatch]:
    """The batches of a unit; with bad samples skipped, those before the place where it is damaged."""
    path, file = shard.below(job.roots), ShardFile(root=job.roots[shard.dataset], path=shard.path, format=shard.format)
    try:
        yield from scan_shard(file, unit, job.fields, job.block_rows)
    except DataError as error:
        if not job.fields.skip_bad or _is_of_the_system(error):
            raise
        rows.end_here(f"damaged: {str(error).splitlines()[0].replace(str(path), 'the shard')}")


def _is_of_the_system(error: DataError) -> bool:
    """Whether a file could not be opened or read at all: what is in it may be whole, and there again in a minute."""
    return isinstance(error.__context__, OSError) and error.__context__.errno is not None


class _RowCollector:
    """Collects the batches of one unit: some dozen bytes per row, no texts."""

    def __init__(self, job: ScanSettings, shard: Shard) -> None:
        self._job = job
        self._dataset = shard.dataset
        kinds = {f.name: f.kind for f in job.properties}
        self._categorical = [name for name, kind in kinds.items() if kind is not Kind.NUMBER]
        self._codes: defaultdict[Combo, int] = defaultdict(count().__next__)
        self._samples: dict[str, list[Ints]] = {"combo": [], "length": [], "tokens": []}
        self._numbers: dict[str, list[NDArray[np.float64]]] = {n: [] for n, k in kinds.items() if k is Kind.NUMBER}
        self._blocks: list[Ints] = []
        self._reasons: Counter[str] = Counter()
        self.held = 0
        """Rows."""
        self.complete = 0
        """Of these, the rows of blocks that have ended."""

    def add(self, batch: RowBatch) -> None:
        ranges = batch.blocks
        self._blocks.append(np.stack([ranges.offset, ranges.length, ranges.rows]))
        self.held += batch.rows
        self.complete += int(ranges.rows.sum())
        if not batch.rows:
            return
        bad = [row for row, _ in batch.bad]
        for _, problem in batch.bad:
            reason = reason_of(problem)
            is_new = reason not in self._reasons and len(self._reasons) >= MAX_REASONS
            self._reasons["other reasons" if is_new else reason] += 1
        documents = _documents(batch, bad)
        columns = {**batch.columns, **self._job.functions.columns(documents)}
        combo = self._combos(columns, batch.rows)
        combo[bad] = IS_BAD
        self._samples["combo"].append(combo)
        for name, found in self._numbers.items():
            found.append(_numbers(columns[name], bad))
        if batch.lengths is not None:
            self._samples["length"].append(batch.lengths)
        if self._job.tokenizer is not None:
            counts = batch.tokens
            if counts is None:
                counts = self._job.tokenizer.count_each(documents or [])
            self._samples["tokens"].append(_zeroed(counts, bad))

    def end_here(self, reason: str) -> None:
        """Forget the rows of a block that will never end."""
        self._keep(*self._columns(), slice(0, self.complete))
        self.held = self.complete
        self._reasons[reason_of(reason)] += 0

    def part(self, fingerprint: str) -> ScanResult:
        """The blocks that have ended; rows of the one that has not stay here."""
        samples, numbers = self._columns()
        self._keep(samples, numbers, slice(self.complete, None))
        taken = {name: values[: self.complete] for name, values in samples.items()}
        rows = np.concatenate([np.zeros((3, 0), np.int64), *self._blocks], axis=1)
        part = self._part(rows, taken, {name: values[: self.complete] for name, values in numbers.items()}, fingerprint)
        self._blocks, self.held, self.complete = [], self.held - self.complete, 0
        self._reasons.clear()
        return part

    def _part(
        self, ranges: Ints, samples: dict[str, Ints], numbers: dict[str, NDArray[np.float64]], fingerprint: str
    ) -> ScanResult:
        offset, length, rows = ranges
        known = list(self._codes)
        occurs = np.bincount(samples["combo"] - IS_BAD, minlength=1) > 0
        used = np.flatnonzero(occurs) + IS_BAD
        samples["combo"] = (np.cumsum(occurs) - 1)[samples["combo"] - IS_BAD]
        is_bad = (used == IS_BAD)[samples["combo"]]
        per_block, cells = histogram_of(rows, samples, len(used), 0 if is_bad.any() else None)  # IS_BAD sorts first.
        return ScanResult(
            combos=[None if code == IS_BAD else known[code] for code in used.tolist()],
            blocks={"offset": offset, "length": length, "rows": rows, "count": per_block},
            cells=cells,
            zones={name: zones_of(values, rows, is_bad) for name, values in numbers.items()},
            samples=samples,
            numbers=numbers,
            fingerprint=fingerprint,
            reasons=dict(self._reasons),
        )

    def _columns(self) -> tuple[dict[str, Ints], dict[str, NDArray[np.float64]]]:
        """Everything held."""
        samples = {name: np.concatenate(found) for name, found in self._samples.items() if found}
        samples.setdefault("combo", np.zeros(0, np.int64))
        return samples, {name: np.concatenate([np.zeros(0), *found]) for name, found in self._numbers.items()}

    def _keep(self, samples: dict[str, Ints], numbers: dict[str, NDArray[np.float64]], rows: slice) -> None:
        self._samples |= {name: [values[rows]] for name, values in samples.items()}
        self._numbers = {name: [values[rows]] for name, values in numbers.items()}

    def _combos(self, columns: Mapping[str, Column], rows: int) -> Ints:
        """The unit's code of every row's combo."""
        if self._dataset:
            columns = {**columns, DATASET: Categories([(self._dataset,)], np.zeros(rows, np.int32))}
        found = [columns[name] for name in self._categorical]
        values, code = combine_columns([c for c in found if isinstance(c, Categories)], rows)
        codes = np.fromiter((self._codes[v] for v in values), np.int64, len(values))
        return codes[code]


def _documents(batch: RowBatch, bad: Sequence[int]) -> list[str] | None:
    """The texts, empty for rows that cannot be read; None where there are none."""
    if batch.documents is None or not bad:
        return batch.documents
    known = set(bad)
    return ["" if row in known else text for row, text in enumerate(batch.documents)]


def _numbers(column: Column, bad: Sequence[int]) -> NDArray[np.float64]:
    values = column if isinstance(column, np.ndarray) else column.code.astype(np.float64)
    if not bad:
        return values
    values = values.copy()
    values[bad] = np.nan
    return values


def _zeroed(counts: Ints, bad: Sequence[int]) -> Ints:
    if not bad:
        return counts
    counts = counts.copy()
    counts[bad] = 0
    return counts
