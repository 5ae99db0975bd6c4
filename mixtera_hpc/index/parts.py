"""Scanned units on disk, so that a build needs no memory for them and goes on after a kill.

Every rank appends the parts of its units to a log of its own in `.<index>.building/`. A record is checksummed; what a kill cut
short is not found again, everything before it is. Price: the sample columns are written twice, once here.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import narrow
from mixtera_hpc.index.scan import Combo, UnitPart

__all__ = ["PartLog", "PartRecord", "building_folder", "find_parts", "locked", "recover_parts"]

_PREFIX = struct.Struct("<8sIQI")
_MAGIC = b"mixpart1"


class _Header(msgspec.Struct):
    unit: int
    fingerprint: str
    combos: list[Combo]
    arrays: list[tuple[str, str, int]]
    """Name, dtype and length of every array, in the order of the body."""
    rows: int
    maxima: dict[str, int]
    """Largest value of each integer sample column."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A unit's part that lies in a log."""

    path: Path
    body: int
    """Where the arrays begin."""
    header: _Header

    @property
    def unit(self) -> int:
        return self.header.unit

    @property
    def fingerprint(self) -> str:
        """Of the shard, when this is its first unit."""
        return self.header.fingerprint

    @property
    def num_rows(self) -> int:
        return self.header.rows

    @property
    def combos(self) -> list[Combo]:
        return self.header.combos

    def maximum(self, column: str) -> int | None:
        """Largest value of an integer sample column, None where the unit does not have it."""
        return self.header.maxima.get(column)

    def load(self, *prefixes: str) -> dict[str, NDArray[Any]]:
        """The arrays whose names begin with one of `prefixes`, by name; nothing else is read."""
        found, position = {}, self.body
        with self.path.open("rb") as file:
            for name, dtype, length in self.header.arrays:
                if name.startswith(prefixes):
                    file.seek(position)
                    found[name] = np.fromfile(file, dtype, length)
                position += np.dtype(dtype).itemsize * length
        return found


class PartLog:
    """Where one rank appends its parts."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.parts").open("xb")

    def append(self, unit: int, part: UnitPart) -> None:
        """Write the part of one unit."""
        arrays = {name: narrow(values) for name, values in _flat(part)}
        maxima = {name: int(values.max(initial=0)) for name, values in part.samples.items()}
        described = [(name, values.dtype.str, len(values)) for name, values in arrays.items()]
        fields = _Header(
            unit=unit,
            fingerprint=part.fingerprint,
            combos=part.combos,
            arrays=described,
            rows=part.num_rows,
            maxima=maxima,
        )
        header = msgspec.json.encode(fields)
        body = [values.tobytes() for values in arrays.values()]
        checksum = zlib.crc32(header)
        for piece in body:
            checksum = zlib.crc32(piece, checksum)
        self._file.write(_PREFIX.pack(_MAGIC, len(header), sum(map(len, body)), checksum))
        self._file.writelines([header, *body])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _flat(part: UnitPart) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array of a part under a name of its own."""
    for group in ("blocks", "cells", "samples", "numbers"):
        yield from ((f"{group}/{name}", values) for name, values in getattr(part, group).items())
    for number, zones in part.zones.items():
        yield from ((f"zones/{name}/{number}", values) for name, values in zones.items())


def building_folder(index: Path) -> Path:
    """Where an index is built; hidden, beside it."""
    return index.with_name(f".{index.name}.building")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second build of the same index out for as long as this process lives.

    Raises:
        PropertyIndexError: another process builds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PropertyIndexError(
                f"Another process is building this index: {folder} is locked.\n  Wait for it, or set another index.path."
            ) from None
        except OSError:
            pass  # This file system has no locks; whoever builds twice at once is on their own.
        yield


def recover_parts(folder: Path) -> dict[int, PartRecord]:
    """Every whole record of every log, by unit, after cutting each log where a kill or a crash left it damaged."""
    found: dict[int, PartRecord] = {}
    for path in sorted(folder.glob("*.parts")):
        with path.open("r+b") as file:
            end = 0
            while record := _read_record(path, file, verify=True):
                found.setdefault(record.unit, record)
                end = file.tell()
            file.truncate(end)
    return found


def find_parts(folder: Path) -> dict[int, PartRecord]:
    """Every record of every log, by unit; logs of earlier attempts have been through `recover_parts`."""
    found: dict[int, PartRecord] = {}
    for path in sorted(folder.glob("*.parts")):
        with path.open("rb") as file:
            while record := _read_record(path, file, verify=False):
                found.setdefault(record.unit, record)
    return found


def _read_record(path: Path, file: BinaryIO, verify: bool) -> PartRecord | None:
    """The record at the file's position, which then moves behind it; None where there is no whole one."""
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, header_size, body_size, checksum = _PREFIX.unpack(prefix)
    if magic != _MAGIC or header_size + body_size > os.fstat(file.fileno()).st_size - file.tell():
        return None
    header, body = file.read(header_size), file.tell()
    if verify and _checksum(header, file, body_size) != checksum:
        return None
    file.seek(body + body_size)
    return PartRecord(path, body, msgspec.json.decode(header, type=_Header))


def _checksum(header: bytes, file: BinaryIO, body_size: int) -> int:
    found = zlib.crc32(header)
    while body_size and (piece := file.read(min(body_size, 1 << 20))):
        found = zlib.crc32(piece, found)
        body_size -= len(piece)
    return found
