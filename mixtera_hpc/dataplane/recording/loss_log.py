"""The mean loss of every sequence, kept on disk with `dataplane.record_losses`.

One append-only binary file per attempt and rank that recorded losses. A record is written whole when the reduction of
its step starts, so a killed rank loses at most its last step. Readers skip a record that was cut short.

Ranks of one group may write copies: none of them knows whether its peers record. Readers take one copy. Price: 4 bytes
per sequence, and 20 bytes per step and rank.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.track.append_file import AppendFile

__all__ = ["LossLog", "RecordedLosses", "read_losses"]

_HEADER = struct.Struct("<qiiI")
"""Step, first position, number of sequences, and CRC-32 of these three and the losses; little-endian."""

_FACTS = struct.Struct("<qii")
"""The header without the checksum."""

_LOSS = np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedLosses:
    """The losses that one rank logged of one step."""

    step: int
    first: int
    """Position of the first sequence in the global batch; the others follow it."""
    means: NDArray[np.float32]
    """Mean token loss of every sequence in nats; see `steps.step_losses.means_of`."""


class LossLog:
    """The losses that one rank recorded; creates its file with the first ones."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet."""
        self._path = path
        self._file: AppendFile | None = None

    def write(self, step: int, positions: NDArray[np.int64], means: NDArray[np.float32]) -> None:
        """Append the losses of one step; `positions` are consecutive."""
        if self._file is None:
            self._file = _open_append(self._path)
        facts = (step, int(positions[0]), len(means))
        content = means.astype(_LOSS).tobytes()
        self._file.append(_HEADER.pack(*facts, _checksum(facts, content)) + content)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_losses(path: Path) -> Iterator[RecordedLosses]:
    """Yield the records of a loss log, without a last one that was cut short.

    Raises:
        DataError: a record is damaged.
    """
    for record, _ in _records(path):
        yield record


def _records(path: Path) -> Iterator[tuple[RecordedLosses, int]]:
    """Yield every complete record, and where it ends in the file."""
    raw = path.read_bytes()
    end = 0
    while end + _HEADER.size <= len(raw):
        step, first, count, checksum = _HEADER.unpack_from(raw, end)
        start = end + _HEADER.size
        end = start + count * _LOSS.itemsize
        if end > len(raw) and not _is_followed(raw, start):
            return
        if count < 0 or checksum != _checksum((step, first, count), raw[start:end]):
            raise DataError(f"{path} is damaged at byte {start - _HEADER.size}.\n  Restore the file, or delete it.")
        means = np.frombuffer(raw, _LOSS, count, start)
        yield RecordedLosses(step=step, first=first, means=means), end


def _is_followed(raw: bytes, start: int) -> bool:
    """Return True if a whole record begins at or after byte `start`.

    If so, the record before it was not cut short, but its number of sequences is damaged.
    """
    for position in range(start, len(raw) - _HEADER.size + 1, _LOSS.itemsize):
        step, first, count, checksum = _HEADER.unpack_from(raw, position)
        begin = position + _HEADER.size
        end = begin + count * _LOSS.itemsize
        if begin < end <= len(raw) and checksum == _checksum((step, first, count), raw[begin:end]):
            return True
    return False


def _checksum(facts: tuple[int, int, int], content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(_FACTS.pack(*facts)))


def _open_append(path: Path) -> AppendFile:
    """Open `path` for appending, after truncating an incomplete last record of a killed writer."""
    file = AppendFile(path)
    file.truncate(max((end for _, end in _records(path)), default=0))
    return file
