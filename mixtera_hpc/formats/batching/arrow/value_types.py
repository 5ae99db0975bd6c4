"""Types of Arrow columns: texts, lists, and string views, which Arrow converts to plain types first."""

from typing import Any

import pyarrow as pa

__all__ = ["TEXT_TYPES", "holds_texts", "is_list", "without_views"]

_PLAIN_TYPES = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
"""Types without views; the large ones have 64-bit offsets, so that any column can be converted."""
TEXT_TYPES = (pa.string(), pa.binary(), *_PLAIN_TYPES, *_PLAIN_TYPES.values())
"""Types of a column that may hold the text of documents."""


def holds_texts(arrow_type: Any) -> bool:
    """Return True for a text type, and for a type that contains one at any depth."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if arrow_type in (pa.string(), pa.large_string(), pa.string_view()):
        return True
    return any(holds_texts(arrow_type.field(i).type) for i in range(arrow_type.num_fields))


def is_list(arrow_type: Any) -> bool:
    """Return True for a list type of any offset width."""
    return bool(pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type))


def without_views(table: Any) -> Any:
    """Convert string views (Polars writes them) to plain strings: Arrow cannot take rows out of views yet."""
    fields = [field.with_type(_plain_type(field.type)) for field in table.schema]
    if all(map(pa.Field.equals, fields, table.schema)):
        return table
    return table.cast(pa.schema(fields))


def _plain_type(arrow_type: Any) -> Any:
    """Return the type with all views in it, at any depth, replaced by plain types."""
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in arrow_type])
    if is_list(arrow_type):
        list_type = pa.large_list if pa.types.is_large_list(arrow_type) else pa.list_
        return list_type(arrow_type.value_field.with_type(_plain_type(arrow_type.value_type)))
    return _PLAIN_TYPES.get(arrow_type, arrow_type)
