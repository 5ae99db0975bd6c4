"""The files of a row store, and the check that a store belongs to an index.

A store is the folder `INDEX.rows` with four kinds of files:

- `store.json`: what the store was made from, and whether it is complete
- `rows-NUMBER.zst`: Zstandard frames of about 64 KiB of JSON lines; the rows of a frame have the same categorical
  values
- `places-FINGERPRINT.bin`: for every row of the index two int64: file number × 2^48 + first byte of its frame, and
  bytes of the frame × 2^32 + number of the row in the frame; both are 0 for rows that are not here
- `done-ATTEMPT-RANK.log`: the units that are written; removed when the store is complete

Rows of files that are not compressed JSON lines, and rows that the build skipped, are not here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.store_folder import Count, StoreFolder, blocks_by_source

__all__ = [
    "FRAME_BYTES",
    "PLACE_BYTES",
    "RowStoreFiles",
    "RowStoreHeader",
    "StoredRowBlocks",
    "configured_row_stores",
]

VERSION = 1
FRAME_BYTES = 1 << 16
"""Bytes of the lines of a frame: enough to compress well, and little to decode for one row. The last row of a frame
begins below this size and may end far behind it."""
PLACE_BYTES = 16
"""Bytes of the place of a row."""
CURE = "Run mixtera-hpc index build or index refresh again, or set data.materialize=never."


class RowStoreHeader(msgspec.Struct, kw_only=True):
    """The content of `store.json`."""

    version: int = VERSION
    index: str
    """Fingerprint of the index."""
    rows: Count
    """Rows of the index."""
    places: Annotated[str, msgspec.Meta(pattern="^places-[0-9a-f]+[.]bin$")]
    """Name of the file with the place of every row."""
    kept_blocks: Count = 0
    """First blocks of the index whose rows were there before the last refresh."""
    generations: list[str] = []
    """Fingerprints of earlier states of the index, whose rows come first in it."""
    complete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRowBlocks:
    """A checked store, and the blocks of a run's indexes that it holds. Rank 0 sends it to every rank."""

    folder: str
    places: str
    """Path of the file with the place of every row."""
    first_block: int
    """Position of the first block of its index among the blocks of all joined indexes."""
    last_block: int
    """One past the last block."""


@dataclass(frozen=True, slots=True)
class RowStoreFiles(StoreFolder):
    """The paths of a row store."""

    @classmethod
    def of_index(cls, index: str | Path) -> "RowStoreFiles":
        """Return the store beside an index."""
        return cls(Path(f"{index}.rows"))

    def rows(self, number: int) -> Path:
        """Return a file of frames."""
        return self.folder / f"rows-{number:05d}.zst"

    def read_header(self) -> RowStoreHeader | None:
        """Return the content of `store.json`; None if there is no such file.

        Raises:
            DataError: the file is damaged.
        """
        return self.decode_header(RowStoreHeader, "mixtera-hpc index build", "data.materialize=never")


def configured_row_stores(config: Config, index: PropertyIndex) -> list[StoredRowBlocks]:
    """Return the checked row stores of the indexes that a run reads.

    Raises:
        ConfigError: a store is incomplete, or made from another generation of its index.
        DataError: a store is damaged.
    """
    if config.data.materialize == "never":
        return []
    stores = []
    for source, first_block, last_block in blocks_by_source(index):
        files = RowStoreFiles.of_index(source.path)
        header = _checked_header(files, source.fingerprint)
        if header is not None:
            places = str(files.folder / header.places)
            stores.append(
                StoredRowBlocks(folder=str(files.folder), places=places, first_block=first_block, last_block=last_block)
            )
    return stores


def _checked_header(files: RowStoreFiles, index: str) -> RowStoreHeader | None:
    """Return the header of a store, None if there is none; refuse a store that does not belong to the index."""
    header = files.read_header()
    if header is None:
        return None
    problem = ""
    if header.version != VERSION:
        problem = f"has version {header.version} instead of {VERSION}"
    elif index not in (header.index, *header.generations):
        problem = f"was made from index {header.index[:12]}, but the index is {index[:12]} now"
    elif not header.complete:
        problem = "is incomplete: the index build was interrupted, or is still running"
    if problem:
        raise ConfigError(f"The row store {files.folder} {problem}.\n  {CURE}")
    places = files.folder / header.places
    if not places.is_file() or places.stat().st_size != PLACE_BYTES * header.rows:
        raise DataError(
            f"{places} must have {PLACE_BYTES * header.rows} bytes: it was cut off or removed.\n"
            f"  Remove {files.folder} and run mixtera-hpc index build again, or set data.materialize=never."
        )
    return header
