"""The files that token stores and row stores have in common, and the blocks that a store holds."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from mixtera_hpc.errors import DataError
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.sample_reader import SampleSource

__all__ = ["StoreFolder", "blocks_by_source", "log_unit"]

UNFINISHED_HEADER = ".store.json.*.part"
"""Name of a header that is being written, with the id of the process."""

HeaderT = TypeVar("HeaderT", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """The paths of a store."""

    folder: Path

    @property
    def header(self) -> Path:
        """The file that describes the store."""
        return self.folder / "store.json"

    def log(self, attempt: int, rank: int) -> Path:
        """Return the log of a rank."""
        return self.folder / f"done-{attempt}-{rank}.log"

    def logs(self) -> list[Path]:
        """Return the logs of finished units."""
        return sorted(self.folder.glob("done-*.log"))

    def unfinished_headers(self) -> list[Path]:
        """Return what killed jobs have left of headers that they wrote."""
        return list(self.folder.glob(UNFINISHED_HEADER))

    def decode_header(self, kind: type[HeaderT], cure: str) -> HeaderT | None:
        """Return the content of `store.json`; None if there is no such file.

        Raises:
            DataError: the file is damaged. The message ends with `cure`.
        """
        try:
            return msgspec.json.decode(self.header.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{self.header} cannot be read: {error}.\n  {cure}") from None

    def write_header(self, header: msgspec.Struct) -> None:
        """Replace `store.json` as a whole."""
        temporary = self.folder / UNFINISHED_HEADER.replace("*", str(os.getpid()))
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(header)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.header)


def log_unit(log: int, number: int) -> None:
    """Append a finished unit to a log, given its descriptor. A full disk may take a part of the line only."""
    line = b"%d\n" % number
    while line:
        line = line[os.write(log, line) :]


def blocks_by_source(index: PropertyIndex) -> Iterator[tuple[SampleSource, int, int]]:
    """Yield each index file of joined indexes, its first block among those of all, and one past its last block."""
    sources = index.sample_sources()
    # Blocks of joined indexes follow each other, index by index.
    first_samples = index.tables.blocks.first_sample
    borders = [int(np.searchsorted(first_samples, source.first_sample)) for source in sources]
    borders.append(len(first_samples))
    for source, (first_block, last_block) in zip(sources, pairwise(borders), strict=True):
        yield source, first_block, last_block
