"""Scanned units on disk, so that a build needs no memory for them and goes on after a kill.

Every scanning thread appends the parts of its units to a log of its own in `.<index>.building/`. A record is checksummed; what
a kill cut short is not found again, everything before it is. A unit counts when all its parts are there; parts of one unit
from different attempts are the same, so any of them will do. In memory a record is its place, some hundred bytes. Price: the
sample columns are written twice, once here.
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
from mixtera_hpc.index.scan.scan_result import ScanResult, ScanSummary

__all__ = [
    "LogRecord",
    "RecordHeader",
    "ScanLog",
    "build_lock",
    "building_folder",
    "complete_units",
    "read_logs",
    "recover_logs",
]

_PREFIX = struct.Struct("<8sIQI")
_MAGIC = b"mixpart2"


class RecordHeader(msgspec.Struct):
    """What a part says of itself."""

    unit: int
    number: int
    """Of the part in its unit."""
    last: bool
    fingerprint: str
    """Of the shard, when this is its first part."""
    reasons: dict[str, int]
    summary: ScanSummary
    arrays: list[tuple[str, str, int]]
    """Name, dtype and length of every array, in the order of the body."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A part that lies in a log."""

    path: Path
    position: int
    unit: int
    number: int
    last: bool

    def header(self) -> RecordHeader:
        """What it says of itself, without loading it."""
        with self.path.open("rb") as file:
            return self._header(file)

    def summary(self) -> ScanSummary:
        """What there is in it."""
        return self.header().summary

    def load(self) -> ScanResult:
        """Read it."""
        with self.path.open("rb") as file:
            header = self._header(file)
            arrays = {name: np.fromfile(file, dtype, length) for name, dtype, length in header.arrays}
        return _part(header, arrays)

    def _header(self, file: BinaryIO) -> RecordHeader:
        file.seek(self.position)
        _, header_size, _, _ = _PREFIX.unpack(file.read(_PREFIX.size))
        return msgspec.json.decode(file.read(header_size), type=RecordHeader)


class ScanLog:
    """Where one thread appends its parts."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.parts").open("xb")

    def append(self, unit: int, number: int, part: ScanResult, *, last: bool) -> None:
        """Write one part of a unit."""
        arrays = {name: narrow(values) for name, values in _flat(part)}
        fields = RecordHeader(
            unit=unit,
            number=number,
            last=last,
            fingerprint=part.fingerprint,
            reasons=part.reasons,
            summary=part.summary(),
            arrays=[(name, values.dtype.str, len(values)) for name, values in arrays.items()],
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


def _flat(part: ScanResult) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array of a part under a name of its own."""
    for group in ("blocks", "cells", "samples", "numbers"):
        yield from ((f"{group}/{name}", values) for name, values in getattr(part, group).items())
    for number, zones in part.zones.items():
        yield from ((f"zones/{name}/{number}", values) for name, values in zones.items())


def _part(header: RecordHeader, arrays: dict[str, NDArray[Any]]) -> ScanResult:
    """The inverse of `_flat`."""

    def group(name: str) -> dict[str, NDArray[Any]]:
        found = {key.removeprefix(f"{name}/"): values for key, values in arrays.items() if key.startswith(f"{name}/")}
        return {key: v if v.dtype.kind == "f" else v.astype(np.int64) for key, v in found.items()}

    numbers = group("numbers")
    return ScanResult(
        combos=header.summary.combos,
        blocks=group("blocks"),
        cells=group("cells"),
        samples=group("samples"),
        numbers=numbers,
        zones={n: {z: arrays[f"zones/{z}/{n}"] for z in ("low", "high", "has_null")} for n in numbers},
        fingerprint=header.fingerprint,
        reasons=header.reasons,
    )


def building_folder(index: Path) -> Path:
    """Where an index is built; hidden, beside it."""
    return index.with_name(f".{index.name}.building")


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[None]:
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


def recover_logs(folder: Path) -> list[LogRecord]:
    """Every whole record of every log, after cutting each log where a kill or a crash left it damaged."""
    found: list[LogRecord] = []
    for path in sorted(folder.glob("*.parts")):
        with path.open("r+b") as file:
            end = 0
            while record := _read_record(path, file, verify=True):
                found.append(record)
                end = file.tell()
            file.truncate(end)
    return found


def read_logs(folder: Path) -> list[LogRecord]:
    """Every record of every log; logs of earlier attempts have been through `recover_logs`."""
    found: list[LogRecord] = []
    for path in sorted(folder.glob("*.parts")):
        with path.open("rb") as file:
            while record := _read_record(path, file, verify=False):
                found.append(record)
    return found


def complete_units(records: list[LogRecord]) -> dict[int, list[LogRecord]]:
    """The units all of whose parts are there, with their parts in order."""
    units: dict[int, dict[int, LogRecord]] = {}
    for record in records:
        units.setdefault(record.unit, {}).setdefault(record.number, record)
    ordered = {unit: [parts[number] for number in sorted(parts)] for unit, parts in units.items()}
    return {unit: parts for unit, parts in ordered.items() if parts[-1].last and parts[-1].number == len(parts) - 1}


def _read_record(path: Path, file: BinaryIO, verify: bool) -> LogRecord | None:
    """The record at the file's position, which then moves behind it; None where there is no whole one."""
    position = file.tell()
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
    decoded = msgspec.json.decode(header, type=_RecordPosition)
    return LogRecord(path, position, decoded.unit, decoded.number, decoded.last)


class _RecordPosition(msgspec.Struct):
    """The part of a header that finding it needs."""

    unit: int
    number: int
    last: bool


def _checksum(header: bytes, file: BinaryIO, body_size: int) -> int:
    found = zlib.crc32(header)
    while body_size and (piece := file.read(min(body_size, 1 << 20))):
        found = zlib.crc32(piece, found)
        body_size -= len(piece)
    return found
