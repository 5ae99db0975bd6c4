"""The files that token stores and row stores have in common, and the blocks that a store holds."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.sample_reader import SampleSource

__all__ = ["Count", "StoreFolder", "blocks_by_source", "log_unit"]

UNFINISHED_HEADER = ".store.json.*.part"
"""Name of a header that is being written, with the id of the process."""

Count = Annotated[int, msgspec.Meta(ge=0)]
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
        return sorted(self.folder.glob("done-*-*.log"))

    def logged_units(self) -> set[int]:
        """Return the units that earlier jobs have written."""
        # The text after the last newline is a number that was cut short. A crash may damage other lines.
        lines = [line for path in self.logs() for line in path.read_bytes().split(b"\n")[:-1]]
        return {int(line) for line in lines if line.isdigit()}

    def unfinished_headers(self) -> list[Path]:
        """Return what killed jobs have left of headers that they wrote."""
        return list(self.folder.glob(UNFINISHED_HEADER))

    def decode_header(self, kind: type[HeaderT], verb: str, without: str) -> HeaderT | None:
        """Return the content of `store.json`; None if there is no such file.

        Args:
            kind: the type of the content.
            verb: the command that writes the store.
            without: the setting of a run without the store.

        Raises:
            DataError: the file is damaged, or cannot be read.
        """
        try:
            return msgspec.json.decode(self.header.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(
                f"{self.header} cannot be read: {error.strerror}.\n  Change its permissions, or set {without}."
            ) from None
        except JSON_ERRORS as error:
            raise DataError(
                f"{self.header} is damaged: {error}.\n  Remove {self.folder} and run {verb} again, or set {without}."
            ) from None

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
