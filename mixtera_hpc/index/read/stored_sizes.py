"""What the columns of an index file take on disk."""

from dataclasses import dataclass
from pathlib import Path

import h5py

__all__ = ["ColumnSize", "column_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSize:
    """One column of the file."""

    name: str
    size_bytes: int
    """On disk, compressed where it is."""
    unpacked_bytes: int
    """In memory; for sample columns with the gaps behind short blocks."""


def column_sizes(path: Path) -> list[ColumnSize]:
    """Every column, in the file's order; nothing is read but the metadata."""
    found: list[ColumnSize] = []

    def look(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            sizes = {"size_bytes": int(node.id.get_storage_size()), "unpacked_bytes": int(node.nbytes)}
            found.append(ColumnSize(name=name, **sizes))

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(look)
    return found
