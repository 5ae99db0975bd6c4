"""Columns of properties from Arrow columns: numbers, categories, and lists of categories."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import Column, PropertyField, null_column
from mixtera_hpc.formats.batching.arrow.python_objects import VALUE_ERRORS
from mixtera_hpc.formats.batching.arrow.value_types import is_list
from mixtera_hpc.formats.category_codes import Categories, encode_categories
from mixtera_hpc.formats.shard_errors import unreadable_error

__all__ = ["property_column"]


def property_column(values: Any, field: PropertyField, path: Path) -> Column:
    """Convert the values of one property.

    Raises:
        DataError: the column cannot have the property's kind, or its values are damaged.
    """
    if pa.types.is_null(values.type):
        return null_column(field.kind, len(values))
    if not _can_have_kind(values.type, field.kind):
        raise _wrong_kind_error(values.type, field, path)
    # Large integers lose precision here: numbers are stored as float64.
    if field.kind is Kind.NUMBER:
        numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers
    try:
        return _encode_values(values)
    except VALUE_ERRORS as error:
        raise unreadable_error(path, f"column {field.path!r}", error) from None


def _can_have_kind(arrow_type: Any, kind: Kind) -> bool:
    """Return True if values of this type can be numbers, a category, or (also in lists) categories."""
    if kind is Kind.NUMBER:
        is_float = pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type)
        return bool(pa.types.is_integer(arrow_type) or is_float)
    # Categories may be scalars or lists of scalars, but not structs or lists of lists.
    if kind is Kind.CATEGORIES and is_list(arrow_type):
        arrow_type = arrow_type.value_type
    return not bool(pa.types.is_nested(arrow_type))


def _wrong_kind_error(arrow_type: Any, field: PropertyField, path: Path) -> DataError:
    is_list_of_category = is_list(arrow_type) and field.kind is Kind.CATEGORY
    hint = "Set kind: categories" if is_list_of_category else "Set another path or kind"
    return DataError(
        f"{path}: column {field.path!r} has type {arrow_type}, which cannot be read as the {field.kind} of "
        f"data.properties.{field.name}.\n  {hint}, or exclude the file with data.exclude."
    )


def _encode_values(values: Any) -> Categories:
    """Encode a column of scalars or lists."""
    if is_list(values.type):
        return encode_categories([None if value is None else tuple(value) for value in values.to_pylist()])
    if pa.types.is_boolean(values.type) or pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return encode_categories(values.to_pylist())
    # Texts, and other types (dates, for example) as Arrow writes them.
    return _encode_texts(values)


def _encode_texts(values: Any) -> Categories:
    """Encode a column as text with Arrow's dictionary encoding. Null becomes the last code, if there is a null."""
    # An existing dictionary may have duplicate or unused entries: decode it, then build a new one.
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    values = pc.cast(values, pa.large_string())
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    values = values.dictionary_encode()
    # Code len(texts) is null, which gets a separate entry only if it occurs.
    texts: list[tuple[str, ...]] = [(text,) for text in values.dictionary.to_pylist()]
    code = pc.fill_null(values.indices.cast(pa.int32()), len(texts)).to_numpy(zero_copy_only=False)
    return Categories([*texts, ()] if values.null_count else texts, code)
