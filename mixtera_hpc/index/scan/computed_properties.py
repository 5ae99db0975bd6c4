"""Compute properties: with Python functions over documents or rows, and from the buckets of a number.

A function takes a list of texts (or of rows, with `over: rows`) and returns one value for each: a text or None for a
category, a sequence of texts or None for categories, a number or None for a number. It must depend on its arguments
alone, since any rank may see any of them. Functions come from the configuration only: an index names those it was built
with, but no name in a file is ever imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataSetKeys
from mixtera_hpc.core.domain_keys import ranges_of_bounds
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import USER_CODE_ERRORS, DataError
from mixtera_hpc.formats.base import Column, PropertyField, RowBatch, null_column
from mixtera_hpc.formats.category_codes import Categories, encode_categories
from mixtera_hpc.formats.user_functions import import_function, source_digest

__all__ = ["ComputedProperties", "NumberBuckets", "RowPlace", "UserFunction", "UserFunctionError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlace:
    """The place of the rows of a batch."""

    shard: str
    """Path of the shard."""
    first_row: int
    """Rows of the unit before the batch."""
    unit_start: int
    """First byte of the unit. Rows are counted from there, because the number of rows before it is not known."""

    def note(self, row: int | None) -> str:
        """Return the place of a row of the batch; of the whole batch if it is None."""
        where = f" of those that begin at byte {self.unit_start} or later" if self.unit_start else ""
        if row is None:
            return f"shard={self.shard!r} rows from {self.first_row} on{where}; it fails on no row alone"
        return f"shard={self.shard!r} row={self.first_row + row}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFunction:
    """A function and the property that it computes."""

    field: PropertyField
    """The property; `path` is the import path of the function."""
    call: Callable[[list[Any]], Sequence[Any]]
    over_rows: bool
    """True if it takes rows instead of documents."""
    digest: str
    """Hex digest of the file that defines the function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberBuckets:
    """A category whose value is the bucket that a number lies in."""

    field: PropertyField
    """The property; `path` is the name of the number."""
    bounds: tuple[float, ...]

    def column(self, numbers: NDArray[np.float64]) -> Categories:
        """Return the bucket of each number, as text; null for null and for numbers outside all buckets."""
        ranges = ranges_of_bounds(self.bounds)
        starts = np.array([low for low, _ in (r.cuts for r in ranges)])
        # The buckets touch, so the end of the last one is the only other bound.
        end = ranges[-1].cuts[1]
        code = np.searchsorted(starts, numbers, side="right") - 1
        outside = np.isnan(numbers) | (code < 0) | (numbers >= end)
        code = np.where(outside, len(ranges), code)
        return Categories([*((str(r),) for r in ranges), ()], np.asarray(code, np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedProperties:
    """All computed properties of a data set."""

    functions: tuple[UserFunction, ...] = ()
    """Sorted by property name."""
    buckets: tuple[NumberBuckets, ...] = ()
    """Sorted by property name."""

    @classmethod
    def of(cls, data: DataSetKeys) -> "ComputedProperties":
        """Import the functions that the configuration of a data set names, and take over its buckets.

        Raises:
            ConfigError: a function cannot be imported, or is not callable.
        """
        functions = []
        buckets = []
        for name, spec in sorted(data.properties.items()):
            # Properties with a path are read by the formats.
            if spec.function:
                call = import_function(spec.function, f"data.properties.{name}.function")
                field = PropertyField(name=name, path=spec.function, kind=Kind(spec.kind))
                over_rows = spec.over == "rows"
                digest = source_digest(call)
                functions.append(UserFunction(field=field, call=call, over_rows=over_rows, digest=digest))
            elif spec.number is not None:
                field = PropertyField(name=name, path=spec.number, kind=Kind.CATEGORY)
                buckets.append(NumberBuckets(field=field, bounds=tuple(spec.buckets or ())))
        return cls(functions=tuple(functions), buckets=tuple(buckets))

    @property
    def fields(self) -> tuple[PropertyField, ...]:
        """Return the properties."""
        of_functions = tuple(function.field for function in self.functions)
        return of_functions + tuple(bucket.field for bucket in self.buckets)

    @property
    def needs_documents(self) -> bool:
        """Return whether some function takes documents."""
        return any(not function.over_rows for function in self.functions)

    @property
    def needs_rows(self) -> bool:
        """Return whether some function takes rows."""
        return any(function.over_rows for function in self.functions)

    @property
    def identity(self) -> list[Any]:
        """Return what distinguishes the results of two versions of these properties; fit for JSON."""
        functions = [[f.field, f.over_rows, f.digest] for f in self.functions]
        return [functions, [[b.field, b.bounds] for b in self.buckets]]

    def columns(self, batch: RowBatch, place: RowPlace) -> dict[str, Column]:
        """Compute the properties of functions for the rows of a batch; null for rows that cannot be read.

        Args:
            batch: the rows.
            place: where they are, for messages.

        Raises:
            DataError: rows have no documents, or a function failed or did not return one value of its kind for each.
        """
        bad = {row for row, _ in batch.bad}
        columns = {}
        for function in self.functions:
            try:
                columns[function.field.name] = _compute(function, _arguments(function, batch, bad), bad)
            except UserFunctionError as error:
                # Arguments leave out bad rows if they are rows, and have empty texts for them otherwise.
                rows = [row for row in range(batch.rows) if not (function.over_rows and row in bad)]
                error.add_note(place.note(None if error.position is None else rows[error.position]))
                raise
        return columns

    def bucket_columns(self, numbers: Mapping[str, NDArray[np.float64]], rows: int) -> dict[str, Column]:
        """Return the properties of buckets, given the numbers of `rows` rows by name; a missing number is null."""
        null = null_column(Kind.NUMBER, rows)
        columns: dict[str, Column] = {}
        for bucket in self.buckets:
            values = numbers.get(bucket.field.path, null)
            columns[bucket.field.name] = bucket.column(np.asarray(values, np.float64))
        return columns


class UserFunctionError(DataError):
    """A function of the user failed, or returned a value of another kind."""

    def __init__(self, message: str, position: int | None) -> None:
        super().__init__(message)
        self.position = position
        """Position of the first argument that it failed on; None if it fails on none of them alone."""


def _arguments(function: UserFunction, batch: RowBatch, bad: set[int]) -> list[Any]:
    """Return the documents or rows that a function is called with.

    Documents of rows that cannot be read are empty; such rows themselves are left out.
    """
    if function.over_rows:
        return [row for number, row in enumerate(batch.raw_rows or []) if number not in bad]
    # Formats that hold token ids have no texts.
    if batch.documents is None or len(batch.documents) != batch.rows:
        raise DataError(
            f"data.properties.{function.field.name} is computed from documents, but these rows have no text."
        )
    return ["" if number in bad else text for number, text in enumerate(batch.documents)] if bad else batch.documents


def _compute(function: UserFunction, arguments: list[Any], bad: set[int]) -> Column:
    field = function.field
    values = _call(function, arguments)
    # A shifted column would give every row the value of another.
    if len(values) != len(arguments):
        what = "rows" if function.over_rows else "documents"
        raise DataError(
            f"{field.path} returned {len(values)} values for {len(arguments)} {what}; data.properties.{field.name} "
            "needs one for each."
        )
    try:
        return _column_of(_with_nulls(values, bad) if function.over_rows and bad else values, field.kind)
    except (TypeError, ValueError, OverflowError) as error:
        position = _first_failing(lambda value: _column_of([value], field.kind), values)
        raise UserFunctionError(
            f"{field.path} returned a value that is no {field.kind} of data.properties.{field.name}: {error}.", position
        ) from None


def _column_of(values: Sequence[Any], kind: Kind) -> Column:
    """Return the column of the values of a function; raises TypeError, ValueError or OverflowError for wrong ones."""
    if kind is Kind.NUMBER:
        # Raises for values that have no float64, such as sequences and huge integers.
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return encode_categories([_as_category(value, kind) for value in values])


def _first_failing(action: Callable[[Any], Any], arguments: Sequence[Any]) -> int | None:
    """Return the position of the first argument for which `action` fails; None if there is none."""
    for position, argument in enumerate(arguments):
        try:
            action(argument)
        except USER_CODE_ERRORS:
            return position
    return None


def _with_nulls(values: Sequence[Any], bad: set[int]) -> list[Any]:
    """Return the values of all rows, given those of the rows that can be read."""
    remaining = iter(values)
    return [None if row in bad else next(remaining) for row in range(len(values) + len(bad))]


def _call(function: UserFunction, arguments: list[Any]) -> Sequence[Any]:
    """Call the user's function.

    Raises:
        UserFunctionError: it raised an exception.
    """
    try:
        # A copy: the function may sort or change its list.
        values = function.call(list(arguments))
        return values if hasattr(values, "__len__") else list(values)
    except USER_CODE_ERRORS as error:
        position = _first_failing(lambda argument: function.call([argument]), arguments)
        raise UserFunctionError(
            f"{function.field.path}, the function of data.properties.{function.field.name}, failed: "
            f"{type(error).__name__}: {error}.\n"
            "  Correct the function, or exclude the file with data.exclude.",
            position,
        ) from error


def _as_category(value: Any, kind: Kind) -> Any:
    """Return a value as `encode_categories` takes it.

    Raises:
        TypeError: it is not a value of that kind.
    """
    # NumPy scalars become Python's, so that their text is the same.
    scalar = value.item() if isinstance(value, np.generic) else value
    if scalar is None or isinstance(scalar, bool | int | float | str):
        return scalar
    if kind is Kind.CATEGORIES and not isinstance(scalar, bytes | Mapping):
        return tuple(_as_category(part, Kind.CATEGORY) for part in scalar)
    raise TypeError(f"got {type(value).__name__} {value!r:.60}")
