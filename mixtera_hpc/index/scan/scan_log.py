"""Store scan results on disk, so that a build needs no memory for them and resumes after a kill.

Every scanning thread appends the results of its units to a separate log in `.<index>.building/`. A record has a
checksum: a truncated record is dropped, all records before it are used. A unit is complete when all its results
are in some log; results of one unit from different attempts are equal, so any of them will do. In memory a record takes
about a hundred bytes.
Price: the sample columns are written twice, once here.
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
from mixtera_hpc.index.scan.token_spool import SpooledTokens

__all__ = [
    "LOG_PATTERN",
    "LogRecord",
    "RecordHeader",
    "ScanLog",
    "build_lock",
    "complete_units",
    "read_logs",
    "recover_logs",
]

LOG_PATTERN = "*.scanlog"
"""File names of the logs in the folder of a build."""
_PREFIX = struct.Struct("<8sIQI")
"""Before each record: magic, bytes of the header, bytes of the body, CRC-32 of both."""
_MAGIC = b"mixscan5"
_CHECKSUM_BYTES = 1 << 20
"""Bytes of a body that are read at once."""


class RecordHeader(msgspec.Struct):
    """Header that describes the content of a record."""

    unit: int
    number: int
    """Position of the result among those of its unit."""
    last: bool
    """True if it is the last result of its unit."""
    fingerprint: str
    """Fingerprint of the shard, if this is its first result; else empty."""
    reasons: dict[str, int]
    path_forms: dict[str, list[int]]
    """Dotted path → the forms of it that have values in the unit, up to here."""
    summary: ScanSummary
    spooled: SpooledTokens | None
    """The place of the token ids, if they are kept."""
    arrays: list[tuple[str, str, int]]
    """Name, dtype and length of every array, in the order of the body."""


class _RecordPosition(msgspec.Struct):
    """The fields of a header that identify the record."""

    unit: int
    number: int
    last: bool


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A scan result in a log."""

    path: Path
    position: int
    unit: int
    number: int
    last: bool

    def header(self) -> RecordHeader:
        """Read the header alone."""
        with self.path.open("rb") as file:
            return self._read_header(file)

    def summary(self) -> ScanSummary:
        """Read the summary of the result."""
        return self.header().summary

    def load(self) -> ScanResult:
        """Read the result."""
        with self.path.open("rb") as file:
            header = self._read_header(file)
            arrays = {name: np.fromfile(file, dtype, length) for name, dtype, length in header.arrays}
        return _result_from_arrays(header, arrays)

    def _read_header(self, file: BinaryIO) -> RecordHeader:
        file.seek(self.position)
        _, header_size, _, _ = _PREFIX.unpack(file.read(_PREFIX.size))
        return msgspec.json.decode(file.read(header_size), type=RecordHeader)


class ScanLog:
    """The log of one thread, open for appending."""

    def __init__(self, folder: Path, name: str) -> None:
        # Exclusive creation: only one worker of one attempt uses this name.
        self._file = (folder / LOG_PATTERN.replace("*", name)).open("xb")

    def append(self, unit: int, number: int, result: ScanResult, *, last: bool) -> None:
        """Append result `number` of a unit."""
        arrays = {name: narrow(values) for name, values in _named_arrays(result)}
        fields = RecordHeader(
            unit=unit,
            number=number,
            last=last,
            fingerprint=result.fingerprint,
            reasons=result.reasons,
            path_forms=result.path_forms,
            summary=result.summary(),
            spooled=result.spooled,
            arrays=[(name, values.dtype.str, len(values)) for name, values in arrays.items()],
        )
        header = msgspec.json.encode(fields)
        # One checksum over header and body: a record is intact as a whole or not at all.
        body = [values.tobytes() for values in arrays.values()]
        checksum = zlib.crc32(header)
        for data in body:
            checksum = zlib.crc32(data, checksum)
        self._file.write(_PREFIX.pack(_MAGIC, len(header), sum(map(len, body)), checksum))
        self._file.writelines([header, *body])
        # To the operating system: a killed process loses nothing. Only a crashed node may, and the checksum tells.
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _named_arrays(result: ScanResult) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield every array of a result under a unique name."""
    for group in ("blocks", "cells", "samples", "numbers"):
        yield from ((f"{group}/{name}", values) for name, values in getattr(result, group).items())
    for number, zones in result.zones.items():
        yield from ((f"zones/{name}/{number}", values) for name, values in zones.items())


def _result_from_arrays(header: RecordHeader, arrays: dict[str, NDArray[Any]]) -> ScanResult:
    """Build a result from the arrays of `_named_arrays`."""
    numbers = _arrays_of_group(arrays, "numbers")
    return ScanResult(
        combos=header.summary.combos,
        blocks=_arrays_of_group(arrays, "blocks"),
        cells=_arrays_of_group(arrays, "cells"),
        samples=_arrays_of_group(arrays, "samples"),
        numbers=numbers,
        zones={
            number: {name: arrays[f"zones/{name}/{number}"] for name in ("low", "high", "has_null")}
            for number in numbers
        },
        fingerprint=header.fingerprint,
        reasons=header.reasons,
        path_forms=header.path_forms,
    )


def _arrays_of_group(arrays: dict[str, NDArray[Any]], group: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of one group under their own names, integers widened again."""
    prefix = f"{group}/"
    # Numbers keep their float type.
    own = {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
    return {name: values if values.dtype.kind == "f" else values.astype(np.int64) for name, values in own.items()}


@contextlib.contextmanager
def build_lock(folder: Path, work: str = "building this index", key: str = "index.path") -> Iterator[None]:
    """Hold the lock of a build, which keeps other processes from building the same index or store.

    Args:
        folder: where the lock is.
        work: what the process that holds the lock is doing, for the message.
        key: the setting that names another place.

    Raises:
        PropertyIndexError: another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PropertyIndexError(
                f"Another process is {work}: {folder} is locked.\n  Wait for it, or set another {key}."
            ) from None
        except OSError:
            pass  # This file system has no locks, so two builds at once are not detected.
        yield


def recover_logs(folder: Path) -> list[LogRecord]:
    """Return every intact record of every log, and truncate each log where a kill or a crash damaged it."""
    records: list[LogRecord] = []
    for path in sorted(folder.glob(LOG_PATTERN)):
        with path.open("r+b") as file:
            end = 0
            while record := _read_record(path, file, verify=True):
                records.append(record)
                end = file.tell()
            # New records would be unreachable behind a damaged one.
            file.truncate(end)
    return records


def read_logs(folder: Path) -> list[LogRecord]:
    """Return every record of every log, without verifying checksums: earlier attempts went through `recover_logs`."""
    records: list[LogRecord] = []
    for path in sorted(folder.glob(LOG_PATTERN)):
        with path.open("rb") as file:
            while record := _read_record(path, file, verify=False):
                records.append(record)
    return records


def complete_units(records: list[LogRecord]) -> dict[int, list[LogRecord]]:
    """Return the units all of whose results are logged, with their records in order."""
    # Unit → number → record. Of equal results from several attempts the first is taken.
    numbered: dict[int, dict[int, LogRecord]] = {}
    for record in records:
        numbered.setdefault(record.unit, {}).setdefault(record.number, record)
    units = {unit: [results[number] for number in sorted(results)] for unit, results in numbered.items()}
    return {unit: results for unit, results in units.items() if _is_complete(results)}


def _is_complete(results: list[LogRecord]) -> bool:
    """Return whether the numbers are 0, 1, … up to the last result of the unit."""
    return results[-1].last and results[-1].number == len(results) - 1


def _read_record(path: Path, file: BinaryIO, verify: bool) -> LogRecord | None:
    """Read the record at the file's position and move behind it; return None if there is no intact one."""
    position = file.tell()
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, header_size, body_size, checksum = _PREFIX.unpack(prefix)
    # A length beyond the end of the file is a truncated record, or garbage.
    if magic != _MAGIC or header_size + body_size > os.fstat(file.fileno()).st_size - file.tell():
        return None
    header = file.read(header_size)
    body_start = file.tell()
    if verify and _checksum(header, file, body_size) != checksum:
        return None
    file.seek(body_start + body_size)
    # Decoding the whole header would build all combos of the result.
    decoded = msgspec.json.decode(header, type=_RecordPosition)
    return LogRecord(path, position, decoded.unit, decoded.number, decoded.last)


def _checksum(header: bytes, file: BinaryIO, body_size: int) -> int:
    checksum = zlib.crc32(header)
    while body_size and (data := file.read(min(body_size, _CHECKSUM_BYTES))):
        checksum = zlib.crc32(data, checksum)
        body_size -= len(data)
    return checksum
