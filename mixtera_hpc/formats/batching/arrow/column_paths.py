"""Columns of Arrow tables at dotted paths, which lead into struct columns; `row_paths` has their meaning."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mixtera_hpc.formats.batching.row_paths import check_path_forms, path_forms

__all__ = ["check_single_form", "column_at", "first_key", "type_at"]


def first_key(names: list[str], path: str) -> str:
    """Return the top-level column in which a path begins."""
    return path if path in names else path.partition(".")[0]


def type_at(schema: Any, path: str) -> Any:
    """Return the Arrow type at a path; None if the schema has nothing there."""
    chains = _keys_at(schema, path)
    return _type_of_keys(schema, chains[0]) if chains else None


def _keys_at(schema: Any, path: str) -> list[tuple[str, ...]]:
    """Return the forms of a path that the schema has, the one that counts first."""
    return [keys for keys in path_forms(path) if _type_of_keys(schema, keys) is not None]


def _type_of_keys(schema: Any, keys: tuple[str, ...]) -> Any:
    """Return the type below a chain of keys; None if one of them does not exist."""
    first, *rest = keys
    if first not in schema.names:
        return None
    arrow_type: Any = schema.field(first).type
    for key in rest:
        # Nothing has a name below a scalar, a list or a map.
        if not pa.types.is_struct(arrow_type) or arrow_type.get_field_index(key) < 0:
            return None
        arrow_type = arrow_type.field(key).type
    return arrow_type


def column_at(table: Any, path: str) -> Any:
    """Return the column at a path, null where a parent is null; None if the table has nothing there."""
    chains = _keys_at(table.schema, path) if table is not None else []
    if not chains:
        return None
    first, *rest = chains[0]
    # struct_field applies the null mask of every parent.
    return pc.struct_field(table.column(first), rest) if rest else table.column(first)


def check_single_form(schema: Any, path: str, shard: Path) -> None:
    """Refuse a file that has columns for more than one meaning of a path.

    Raises:
        ShardLayoutError: it has.
    """
    used = [number for number, keys in enumerate(path_forms(path)) if _type_of_keys(schema, keys) is not None]
    check_path_forms(shard, {path: used})
