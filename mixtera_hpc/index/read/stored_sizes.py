"""Measure the size of the columns of an index file."""

from dataclasses import dataclass
from pathlib import Path

import h5py

from mixtera_hpc.index.open_file import explain_locks

__all__ = ["ColumnSize", "column_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSize:
    """The size of one column."""

    name: str
    size_bytes: int
    """On disk, after compression."""
    unpacked_bytes: int
    """In memory. For sample columns this includes the padding behind short blocks."""


def column_sizes(path: Path) -> list[ColumnSize]:
    """Return the size of every column, in the order of the file. Reads metadata only."""
    sizes: list[ColumnSize] = []

    # h5py calls this for every group and column below the root.
    def measure(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            stored = int(node.id.get_storage_size())
            sizes.append(ColumnSize(name=name, size_bytes=stored, unpacked_bytes=int(node.nbytes)))

    with explain_locks(path), h5py.File(path, "r", locking=False) as file:
        file.visititems(measure)
    return sizes
