"""Scan shards again for properties that an index lacks, and add the new columns to the blocks that it stores.

A shard is scanned in the units of its format, like in a build, but only for the new properties. The rows of a unit are
those of consecutive stored blocks: the place of its first block says which. Where only buckets of stored numbers are
new, no shard is opened.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError, PropertyIndexError, pluralize
from mixtera_hpc.formats.base import Column, PropertyField, RowBatch, ScanUnit, null_column
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS
from mixtera_hpc.formats.shard_file import ShardFile
from mixtera_hpc.formats.shard_scan import scan_shard
from mixtera_hpc.index.build.extend_result import add_columns, concatenate_columns
from mixtera_hpc.index.build.stored_blocks import StoredBlocks
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.scan.computed_properties import RowPlace
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, size_numbers
from mixtera_hpc.index.scan.unit_scan import DataSetScan

__all__ = ["NewProperties", "extend_blocks", "extend_unit"]

LOGGER = logging.getLogger("mixtera_hpc")
RESULT_ROWS = 1 << 19
"""Rows of complete blocks at which a result ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewProperties:
    """The properties that a derivation adds to the samples of one data set."""

    scan: DataSetScan
    """The scan that reads and computes the new properties."""
    nulls: tuple[PropertyField, ...] = ()
    """New properties that only other data sets have."""
    skips_bad: bool = False
    """The new properties are null in rows where they cannot be read, instead of ending the derivation."""

    @property
    def reads_shards(self) -> bool:
        """Return whether shards have to be read; buckets need only the numbers of the index."""
        return bool(self.scan.spec.properties or self.scan.computed.functions)

    def columns(self, result: ScanResult, read: Mapping[str, Column]) -> dict[str, Column]:
        """Return all new columns of a stored result, given those that were read from its shard."""
        rows = result.num_rows
        columns = {field.name: null_column(field.kind, rows) for field in self.nulls} | dict(read)
        numbers = size_numbers(result.samples)
        numbers |= result.numbers | {name: c for name, c in columns.items() if isinstance(c, np.ndarray)}
        return columns | self.scan.computed.bucket_columns(numbers, rows)


def extend_blocks(
    index: PropertyIndex, combos: list[Combo | None], blocks: range, new: NewProperties, read: Mapping[str, Column]
) -> ScanResult:
    """Return the stored content of some blocks with the new columns.

    Args:
        index: an open index.
        combos: all combos of the index, by number.
        blocks: consecutive block numbers.
        new: the new properties.
        read: the columns that were read from the shard, for the rows of these blocks.
    """
    result = StoredBlocks(index, combos, blocks.start, blocks.stop).load()
    return add_columns(result, list(index.tables.combos.properties), new.columns(result, read))


def extend_unit(
    index: PropertyIndex, combos: list[Combo | None], shard: int, unit: ScanUnit, new: NewProperties
) -> Iterator[ScanResult]:
    """Scan one unit of a shard; yield the stored content of its blocks with the new columns, at least one result.

    Raises:
        DataError: the rows of the unit are not those that the index stores, or a new value cannot be read.
    """
    rows = _ScannedRows(index, shard, unit, new)
    has_result = False
    for batch in _batches(index, shard, unit, new):
        rows.add(batch)
        if rows.num_held >= RESULT_ROWS and (blocks := rows.complete_blocks()):
            yield extend_blocks(index, combos, blocks, new, rows.take(blocks))
            has_result = True
    blocks = rows.complete_blocks()
    # Rows behind the last block belong to the damaged end of a shard, which the build left out.
    if rows.num_in(blocks) != rows.num_held and not _is_damaged(index, shard):
        raise _other_rows(_path_of(index, shard))
    if len(blocks) or not has_result:
        yield extend_blocks(index, combos, blocks, new, rows.take(blocks))


class _ScannedRows:
    """The new columns of rows that were scanned and whose blocks are not complete yet."""

    def __init__(self, index: PropertyIndex, shard: int, unit: ScanUnit, new: NewProperties) -> None:
        self._index = index
        self._unit_start = unit.start
        self._shard = shard
        self._new = new
        self._bounds = np.searchsorted(index.tables.blocks.shard, [shard, shard + 1])
        self._next_block: int | None = None
        self._batches: list[Mapping[str, Column]] = []
        self._bad: list[NDArray[np.bool_]] = []
        self._problems: list[tuple[int, str]] = []
        self._num_taken = 0
        self.num_held = 0
        """Rows whose columns are held."""

    def add(self, batch: RowBatch) -> None:
        """Add the columns of a batch."""
        if self._next_block is None and len(batch.blocks.offset):
            self._next_block = self._block_at(int(batch.blocks.offset[0]))
        self._problems += [(self._num_taken + self.num_held + row, problem) for row, problem in batch.bad]
        place = RowPlace(
            shard=str(_path_of(self._index, self._shard)),
            first_row=self._num_taken + self.num_held,
            unit_start=self._unit_start,
        )
        computed = self._new.scan.computed.columns(batch, place) if batch.rows else {}
        self._batches.append({**batch.columns, **computed} if batch.rows else {})
        self.num_held += batch.rows

    def complete_blocks(self) -> range:
        """Return the stored blocks all of whose rows are held."""
        first = self._next_block
        if first is None:
            return range(int(self._bounds[0]), int(self._bounds[0]))
        ends = np.cumsum(self._index.tables.blocks.rows[first : self._bounds[1]], dtype=np.int64)
        return range(first, first + int(np.searchsorted(ends, self.num_held, side="right")))

    def num_in(self, blocks: range) -> int:
        """Return the rows of some blocks."""
        return int(self._index.tables.blocks.rows[blocks.start : blocks.stop].sum(dtype=np.int64))

    def take(self, blocks: range) -> dict[str, Column]:
        """Return the columns of the rows of `blocks`, which are the next ones, and stop holding them.

        Raises:
            DataError: a new value of a row that the index holds cannot be read.
        """
        count = self.num_in(blocks)
        held = [batch for batch in self._batches if batch]
        names = list(held[0]) if held else []
        columns = {name: concatenate_columns([batch[name] for batch in held]) for name in names}
        unreadable = self._take_unreadable(blocks, count)
        columns = {name: _with_nulls(column, unreadable) for name, column in columns.items()}
        self._batches = [{name: _part(column, slice(count, None)) for name, column in columns.items()}]
        self._num_taken += count
        self.num_held -= count
        if self._next_block is not None:
            self._next_block = blocks.stop
        return {name: _part(column, slice(0, count)) for name, column in columns.items()} or self._empty_columns()

    def _empty_columns(self) -> dict[str, Column]:
        """Return the columns of no rows."""
        scan = self._new.scan
        fields = (*scan.spec.properties, *(function.field for function in scan.computed.functions))
        return {field.name: null_column(field.kind, 0) for field in fields}

    def _block_at(self, offset: int) -> int:
        """Return the stored block that begins at an offset of the shard."""
        offsets = self._index.tables.blocks.offset[self._bounds[0] : self._bounds[1]]
        position = int(np.searchsorted(offsets, offset))
        block = int(self._bounds[0]) + position
        if position == len(offsets) or int(offsets[position]) != offset:
            raise _other_rows(_path_of(self._index, self._shard))
        return block

    def _take_unreadable(self, blocks: range, count: int) -> list[int]:
        """Return the rows of `blocks` that the index holds, but that cannot be read with the new properties.

        Raises:
            DataError: there are such rows, and they are not skipped.
        """
        problems = [(row, problem) for row, problem in self._problems if row < self._num_taken + count]
        self._problems = self._problems[len(problems) :]
        if not problems:
            return []
        index = self._index
        columns = index.read_blocks(np.arange(blocks.start, blocks.stop, dtype=np.int32), {"combo"})
        was_bad = columns.combo == index.tables.combos.bad
        first_row = int(index.tables.blocks.first_row[blocks.start])
        new = [(first_row + r - self._num_taken, p) for r, p in problems if not was_bad[r - self._num_taken]]
        if not new:
            return []
        path = _path_of(index, self._shard)
        if not self._new.skips_bad:
            raise _unreadable(path, new)
        row, problem = new[0]
        LOGGER.warning(
            "%s: new properties are null in %s, first in row %d: %s",
            path,
            pluralize(len(new), "unreadable row"),
            row,
            problem,
        )
        return [row - first_row for row, _ in new]


def _batches(index: PropertyIndex, shard: int, unit: ScanUnit, new: NewProperties) -> Iterator[RowBatch]:
    """Yield the batches of a unit; end quietly where the build found the shard damaged."""
    dataset = index.shard_datasets()[shard]
    shards = index.tables.shards
    file = ShardFile(root=index.roots[dataset], path=shards.path[shard], format=shards.format[shard])
    try:
        # Blocks are matched by their place, so their size does not matter.
        yield from scan_shard(file, unit, new.scan.spec, index.chunk_rows)
    except DataError:
        if not _is_damaged(index, shard):
            raise


def _is_damaged(index: PropertyIndex, shard: int) -> bool:
    """Return whether the build left out the end of a shard."""
    return any(bad.shard == shard and not bad.rows for bad in index.bad)


def _path_of(index: PropertyIndex, shard: int) -> Path:
    return index.data_root / index.shard_paths()[shard]


def _part(column: Column, rows: slice) -> Column:
    return column[rows] if isinstance(column, np.ndarray) else Categories(column.values, column.code[rows])


def _with_nulls(column: Column, rows: Sequence[int]) -> Column:
    """Return a column with null in some rows."""
    if not rows:
        return column
    if isinstance(column, np.ndarray):
        numbers = column.copy()
        numbers[rows] = np.nan
        return numbers
    values = list(column.values)
    if () not in values:
        values.append(())
    code = column.code.copy()
    code[rows] = values.index(())
    return Categories(values, code)


def _other_rows(path: Path) -> PropertyIndexError:
    return PropertyIndexError(
        f"{path} has other rows than the index stores.\n  Run mixtera-hpc index verify --deep, and build again."
    )


def _unreadable(path: Path, problems: Sequence[tuple[int, str]]) -> DataError:
    error = DataError(
        f"{path} has rows of which the new properties cannot be read.\n"
        "  Give the properties another kind, path or pattern. Or set data.on_bad_sample=skip, which makes them null "
        "there."
    )
    for row, problem in problems[:MAX_BAD_ROWS]:
        error.add_note(f"shard={str(path)!r} row={row}: {problem}")
    return error
