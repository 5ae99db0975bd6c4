"""Scan one unit (a byte range of a shard) into results that the merge translates to the numbers of the index.

The results of a unit depend on nothing but the unit. Any rank may scan it at any time, and a result that was logged
before a kill is as good as a new one. A result ends where a block ends, and it has at most 524,288 rows plus one batch
and one block, so memory does not grow with the unit.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import Column, PropertyField, RowBatch, ScanSpec, ScanUnit, null_column
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.shard_errors import ShardLayoutError
from mixtera_hpc.formats.shard_file import ShardFile
from mixtera_hpc.formats.shard_scan import scan_shard
from mixtera_hpc.index.layout import DATASET
from mixtera_hpc.index.scan.computed_properties import ComputedProperties, RowPlace
from mixtera_hpc.index.scan.scan_result import (
    Combo,
    ScanResult,
    combine_columns,
    histogram_of,
    reason_of,
    size_numbers,
    zones_of,
)
from mixtera_hpc.index.scan.token_spool import SpooledTokens, TokenSpool
from mixtera_hpc.index.shards import Shard, fingerprint_of_shard
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["DataSetScan", "ScanSettings", "scan_unit"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESULT_ROWS = 1 << 19
"""Complete rows at which a result ends."""
IS_BAD = -1
"""Combo code of rows that cannot be read, while a unit is scanned."""
MAX_REASONS = 30
"""Reasons counted separately in a result; a user's function may give a new one for every row."""
OTHER_REASONS = "other reasons"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetScan:
    """The settings of a scan of one data set."""

    root: Path
    """Folder of its shards."""
    spec: ScanSpec
    """Values that are read from rows."""
    computed: ComputedProperties
    """The functions of documents, rows and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSettings:
    """The settings that all units of a build share."""

    sets: Mapping[str, DataSetScan]
    """Name of the data set → its scan; a single unnamed one is called ''."""
    block_rows: int
    tokenizer: Tokenizer | None

    @property
    def roots(self) -> dict[str, Path]:
        """Return the folder of every data set."""
        return {name: data_set.root for name, data_set in self.sets.items()}

    @property
    def properties(self) -> tuple[PropertyField, ...]:
        """Return the properties of all data sets, sorted by name; `dataset` is one of them if data sets have names."""
        fields = {} if "" in self.sets else {DATASET: PropertyField(name=DATASET, path="", kind=Kind.CATEGORY)}
        for data_set in self.sets.values():
            fields |= {field.name: field for field in (*data_set.spec.properties, *data_set.computed.fields)}
        return tuple(field for _, field in sorted(fields.items()))


def scan_unit(
    settings: ScanSettings, shard: Shard, unit: ScanUnit, spool: TokenSpool | None = None
) -> Iterator[ScanResult]:
    """Scan one unit; yield its results in order, at least one.

    Args:
        settings: those of the build.
        shard: the data file.
        unit: the part of it to scan.
        spool: keeps the token ids of all documents; None if they are only counted.

    Raises:
        DataError: rows cannot be read and are not skipped (the first ten are named in its notes), or the file has
            changed since it was discovered.
    """
    path = shard.below(settings.roots)
    rows = _RowCollector(settings, shard, unit, spool)
    try:
        # Only the shard's first result carries its fingerprint.
        fingerprint = fingerprint_of_shard(path, shard.size_bytes) if unit.start == 0 else ""
        for batch in _batches_of_unit(settings, shard, unit, rows):
            rows.add(batch)
            if rows.complete >= RESULT_ROWS:
                yield rows.take_result(fingerprint)
                fingerprint = ""
        # A shard that changes during the scan would get rows of two states.
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
    yield rows.take_result(fingerprint)


def _batches_of_unit(settings: ScanSettings, shard: Shard, unit: ScanUnit, rows: "_RowCollector") -> Iterator[RowBatch]:
    """Yield the batches of a unit; if bad samples are skipped, end quietly where the shard is damaged."""
    path = shard.below(settings.roots)
    data_set = settings.sets[shard.dataset]
    file = ShardFile(root=data_set.root, path=shard.path, format=shard.format)
    try:
        yield from scan_shard(file, unit, data_set.spec, settings.block_rows)
    except DataError as error:
        if not data_set.spec.skip_bad or isinstance(error, ShardLayoutError) or _is_system_error(error):
            raise
        reason = str(error).splitlines()[0].replace(str(path), "the shard")
        rows.drop_incomplete(f"damaged: {reason}")


def _is_system_error(error: DataError) -> bool:
    """Return whether the file could not be opened or read at all: its content may be intact, so it is not skipped."""
    return isinstance(error.__context__, OSError) and error.__context__.errno is not None


class _RowCollector:
    """Collects the batches of one unit; a few dozen bytes per row, without texts."""

    def __init__(self, settings: ScanSettings, shard: Shard, unit: ScanUnit, spool: TokenSpool | None) -> None:
        self._settings = settings
        self._spool = spool
        self._spool_start = spool.position if spool is not None else 0
        self._dataset = shard.dataset
        self._path = shard.below(settings.roots)
        self._unit = unit
        self._rows_before = 0  # Rows of the unit before the next batch.
        self._computed = settings.sets[shard.dataset].computed
        kinds = {field.name: field.kind for field in settings.properties}
        self._kinds = kinds
        self._categorical = [name for name, kind in kinds.items() if kind is not Kind.NUMBER]
        self._codes: defaultdict[Combo, int] = defaultdict(count().__next__)  # Combo → its code in this unit.
        self._samples: dict[str, list[Ints]] = {"combo": [], "length": [], "tokens": []}
        self._numbers: dict[str, list[Floats]] = {name: [] for name, kind in kinds.items() if kind is Kind.NUMBER}
        self._blocks: list[Ints] = []  # Rows: offset, length, rows.
        self._reasons: Counter[str] = Counter()
        self._path_forms: dict[str, list[int]] = {}
        self.held = 0
        """Rows collected."""
        self.complete = 0
        """Rows of blocks that have ended; the last block may still be open."""

    def add(self, batch: RowBatch) -> None:
        """Add the rows of a batch, and the blocks that end in it."""
        ranges = batch.blocks
        self._blocks.append(np.stack([ranges.offset, ranges.length, ranges.rows]))
        self.held += batch.rows
        self.complete += int(ranges.rows.sum())
        if not batch.rows:
            return
        self._count_reasons(batch)
        self._path_forms = {path: list(forms) for path, forms in batch.path_forms.items()}
        bad = [row for row, _ in batch.bad]
        sizes = self._sizes_of(batch, bad)
        place = RowPlace(shard=str(self._path), first_row=self._rows_before, unit_start=self._unit.start)
        self._rows_before += batch.rows
        columns = {**batch.columns, **self._computed.columns(batch, place)}
        numbers = size_numbers(sizes) | {n: column for n, column in columns.items() if isinstance(column, np.ndarray)}
        columns |= self._computed.bucket_columns(numbers, batch.rows)
        # A property that only other data sets have is null here.
        columns |= {name: null_column(kind, batch.rows) for name, kind in self._kinds.items() if name not in columns}
        # Rows that cannot be read have arbitrary values until here.
        combo = self._combo_codes(columns, batch.rows)
        combo[bad] = IS_BAD
        self._samples["combo"].append(combo)
        for name, arrays in self._numbers.items():
            arrays.append(_numbers(columns[name], bad))
        for name, values in sizes.items():
            self._samples[name].append(values)

    def _sizes_of(self, batch: RowBatch, bad: Sequence[int]) -> dict[str, Ints]:
        """Return the sample columns `length` and `tokens`, as far as the format and the tokenizer give them."""
        sizes = {} if batch.lengths is None else {"length": batch.lengths}
        if self._settings.tokenizer is not None:
            # Formats that hold token ids count them themselves.
            counts = batch.tokens
            if counts is None:
                documents = _documents(batch, bad) or []
                counts = self._count_tokens(self._settings.tokenizer, documents, bad)
                # A row without a place of its own has the size of its document.
                sizes.setdefault("length", _bytes_of_each(documents))
            sizes["tokens"] = _with_zeros(counts, bad)
        return sizes

    def _count_tokens(self, tokenizer: Tokenizer, documents: list[str], bad: Sequence[int]) -> Ints:
        """Return the number of tokens of each document; keep those of good rows if there is a spool."""
        if self._spool is None:
            return tokenizer.count_each(documents)
        tokens, offsets = tokenizer.encode_batch(documents)
        counts = np.diff(offsets)
        if bad:
            is_good = np.ones(len(documents), np.bool_)
            is_good[list(bad)] = False
            tokens = tokens[np.repeat(is_good, counts)]
        self._spool.append(tokens)
        return counts

    def _spooled_tokens(self, samples: Mapping[str, Ints]) -> SpooledTokens | None:
        """Return the place of the tokens of the complete rows, which are on disk then."""
        if self._spool is None:
            return None
        count = int(samples["tokens"][: self.complete].sum()) if "tokens" in samples else 0
        self._spool.sync()
        spooled = SpooledTokens(
            file=self._spool.name, dtype=self._spool.dtype.str, start=self._spool_start, count=count
        )
        self._spool_start += count
        return spooled

    def drop_incomplete(self, reason: str) -> None:
        """Drop the rows of a block that will never end, because the shard is damaged."""
        self._hold(*self._concatenated(), slice(0, self.complete))
        self.held = self.complete
        # Zero rows: they cannot be counted.
        self._reasons[reason_of(reason)] += 0

    def take_result(self, fingerprint: str) -> ScanResult:
        """Return the blocks that have ended, and hold only the rows of the open one."""
        # Rows of the open block move to the next result.
        samples, numbers = self._concatenated()
        self._hold(samples, numbers, slice(self.complete, None))
        ranges = np.concatenate([np.zeros((3, 0), np.int64), *self._blocks], axis=1)
        spooled = self._spooled_tokens(samples)
        result = self._result(
            ranges,
            {name: values[: self.complete] for name, values in samples.items()},
            {name: values[: self.complete] for name, values in numbers.items()},
            fingerprint,
        )
        result = replace(result, spooled=spooled)
        self._blocks = []
        self.held -= self.complete
        self.complete = 0
        self._reasons.clear()
        return result

    def _result(
        self, ranges: Ints, samples: dict[str, Ints], numbers: dict[str, Floats], fingerprint: str
    ) -> ScanResult:
        # The shape is (3, blocks).
        offset, length, rows = ranges
        combos = list(self._codes)
        # Renumber combos to those that occur here. Codes are shifted by one, so that IS_BAD comes first.
        occurs = np.bincount(samples["combo"] - IS_BAD, minlength=1) > 0
        used = np.flatnonzero(occurs) + IS_BAD
        samples["combo"] = (np.cumsum(occurs) - 1)[samples["combo"] - IS_BAD]
        is_bad = (used == IS_BAD)[samples["combo"]]
        bad = 0 if is_bad.any() else None
        combos_per_block, cells = histogram_of(rows, samples, len(used), bad)
        return ScanResult(
            combos=[None if code == IS_BAD else combos[code] for code in used.tolist()],
            blocks={"offset": offset, "length": length, "rows": rows, "count": combos_per_block},
            cells=cells,
            zones={name: zones_of(values, rows, is_bad) for name, values in numbers.items()},
            samples=samples,
            numbers=numbers,
            fingerprint=fingerprint,
            reasons=dict(self._reasons),
            path_forms=self._path_forms,
        )

    def _count_reasons(self, batch: RowBatch) -> None:
        for _, problem in batch.bad:
            reason = reason_of(problem)
            is_new = reason not in self._reasons
            self._reasons[OTHER_REASONS if is_new and len(self._reasons) >= MAX_REASONS else reason] += 1

    def _concatenated(self) -> tuple[dict[str, Ints], dict[str, Floats]]:
        """Return all sample columns and numbers of the rows held."""
        samples = {name: np.concatenate(arrays) for name, arrays in self._samples.items() if arrays}
        # A unit without rows has no arrays at all.
        samples.setdefault("combo", np.zeros(0, np.int64))
        return samples, {name: np.concatenate([np.zeros(0), *arrays]) for name, arrays in self._numbers.items()}

    def _hold(self, samples: dict[str, Ints], numbers: dict[str, Floats], rows: slice) -> None:
        """Hold only the given rows."""
        self._samples |= {name: [values[rows]] for name, values in samples.items()}
        self._numbers = {name: [values[rows]] for name, values in numbers.items()}

    def _combo_codes(self, columns: Mapping[str, Column], rows: int) -> Ints:
        """Return this unit's code of the combo of every row."""
        if self._dataset:
            columns = {**columns, DATASET: Categories([(self._dataset,)], np.zeros(rows, np.int32))}
        categorical = [columns[name] for name in self._categorical]
        combos, position = combine_columns([c for c in categorical if isinstance(c, Categories)], rows)
        # A new combo gets the next code; the same combo in a later batch gets the same one.
        codes = np.fromiter((self._codes[combo] for combo in combos), np.int64, len(combos))
        return codes[position]


def _documents(batch: RowBatch, bad: Sequence[int]) -> list[str] | None:
    """Return the texts of a batch, empty for rows that cannot be read; None if rows have no text."""
    if batch.documents is None or not bad:
        return batch.documents
    bad_rows = set(bad)
    return ["" if row in bad_rows else text for row, text in enumerate(batch.documents)]


def _bytes_of_each(documents: Sequence[str]) -> Ints:
    """Return the number of bytes of every text in UTF-8."""
    return np.array([len(text.encode("utf-8", "surrogatepass")) for text in documents], np.int64)


def _numbers(column: Column, bad: Sequence[int]) -> Floats:
    """Return a number column, null for rows that cannot be read."""
    values = column if isinstance(column, np.ndarray) else column.code.astype(np.float64)
    if not bad:
        return values
    # The array may belong to the format's buffer.
    values = values.copy()
    values[bad] = np.nan
    return values


def _with_zeros(counts: Ints, bad: Sequence[int]) -> Ints:
    """Return token counts, zero for rows that cannot be read."""
    if not bad:
        return counts
    counts = counts.copy()
    counts[bad] = 0
    return counts
