"""Decoded blocks in memory that the processes of a node share: each of them is decoded once per node.

Whoever asks first for a block decodes it, while the others wait for that block. The memory is a ring: a new block takes
the place of the oldest ones. It has no name and its locks belong to open files, so nothing is left behind by a process
that is killed, and a block that it was writing is never served. A process that is stopped does not stop the others:
after `PATIENCE_S` they decode a block themselves. A block that is too large for the ring is recorded as such, and
every process then decodes it without waiting for others. Price: a few microseconds and one copy per row, and about
20 µs per decoded block. For Parquet, every read copies the whole column of a row group.
"""

import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEADER_BYTES", "Buffer", "DecodedLines", "SharedBlocks"]

T = TypeVar("T")
Ints = NDArray[np.int64]
Buffer = bytes | memoryview
logger = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""Time to wait for a process that decodes a block: more than a block takes, less than a trainer waits for a batch."""
MIN_PAUSE_S = 50e-6
"""Pause after the first failed attempt to lock a byte. It doubles up to `MAX_PAUSE_S`."""
MAX_PAUSE_S = 0.02
MAX_WRITER_PAUSE_S = 0.001
"""Longest pause between attempts to lock the directory for writing, while readers stay away for `MAX_PAUSE_S`."""
MAX_ENTRIES = 4096
_COLUMNS = ("state", "key", "check", "start", "size")
_EMPTY, _WRITING, _READY, _TOO_LARGE = range(4)
ALIGNMENT = 64
RESERVED_BYTES = 64
"""The memory begins with the end of the ring, behind what its owner writes there."""
_NUM_NUMBERS = 2 + MAX_ENTRIES * len(_COLUMNS)
HEADER_BYTES = -(-(RESERVED_BYTES + 8 * _NUM_NUMBERS) // ALIGNMENT) * ALIGNMENT
"""Bytes in front of the ring, which begins at the border of a cache line."""
MAX_SHARE = 0.25
"""Largest part of the ring for one block."""
_DIRECTORY = 0
"""Byte whose lock protects the directory. The byte 1 + key protects the decoding of a block."""
_MAX_KEY = 1 << 62


class DecodedLines(NamedTuple):
    """The lines of a decoded block."""

    data: bytes
    ends: Ints
    """End of every row inside `data`, where the next row begins; shape (rows,)."""


class SharedBlocks:
    """The blocks of a node, as one reading thread sees them. Not thread-safe."""

    def __init__(self, fd: int, patience_s: float = PATIENCE_S) -> None:
        """Map the memory behind a descriptor, which may be closed afterwards. New memory is empty.

        Args:
            fd: the descriptor.
            patience_s: time to wait for other processes.
        """
        # Locks belong to what is opened here, not to the process: two threads exclude each other, too.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._patience_s = patience_s
        self._is_usable = True
        """False after another process held the lock of the directory for too long."""
        self._overdue: set[int] = set()
        """Bytes whose lock another process held for too long. This process does not wait for them again."""
        size = os.fstat(self._fd).st_size
        self._memory = mmap.mmap(self._fd, size)
        numbers = np.frombuffer(self._memory, np.int64, _NUM_NUMBERS, RESERVED_BYTES)
        self._end = numbers[:1]
        """Number of bytes reserved so far. The ring continues at this number modulo its size."""
        self._writer_ns = numbers[1:2]
        """Time until which readers let a process that waits to write the directory go first; 0 without one."""
        self._columns = dict(zip(_COLUMNS, numbers[2:].reshape(len(_COLUMNS), MAX_ENTRIES), strict=True))
        self._ring_bytes = size - HEADER_BYTES

    @staticmethod
    def memory_bytes(max_bytes: int) -> int:
        """Return the size of the memory for blocks of `max_bytes` together; the smallest one keeps none."""
        return max(max_bytes, ALIGNMENT) + HEADER_BYTES

    @property
    def max_block_bytes(self) -> int:
        """Bytes of the largest block that the memory keeps."""
        return int(self._ring_bytes * MAX_SHARE)

    def lines(self, name: str, offset: int, rows: Ints, decode: Callable[[], DecodedLines]) -> list[bytes]:
        """Return some rows of a block.

        Args:
            name: the path of the shard.
            offset: the first byte of the block in the shard.
            rows: positions of the rows inside the block; shape (n,).
            decode: decodes the block. Usually one process of the node calls it.
        """

        def load() -> tuple[list[Buffer], list[bytes]]:
            decoded = decode()
            starts = np.concatenate([[0], decoded.ends[:-1]])[rows].tolist()
            data = decoded.data
            lines = [data[start:end] for start, end in zip(starts, decoded.ends[rows].tolist(), strict=True)]
            return [len(decoded.ends).to_bytes(8, "little"), decoded.ends.astype(np.int64).tobytes(), data], lines

        return self.read(name, offset, lambda memory, first, _stop: _lines_in(memory, first, rows), load)

    def read(
        self,
        name: str,
        offset: int,
        take: Callable[[mmap.mmap, int, int], T],
        decode: Callable[[], tuple[Sequence[Buffer], T]],
    ) -> T:
        """Return a part of a block.

        Args:
            name: the path of the shard, and what is decoded of it.
            offset: the first byte of the block in the shard.
            take: copies the part out of the memory, given the first byte of the block and one past the last.
            decode: decodes the block and returns the bytes to share, and the part. Usually one process of the node
                calls it.
        """
        return self._read(name, offset, take, decode, can_wait=True)

    def read_unless_busy(
        self,
        name: str,
        offset: int,
        take: Callable[[mmap.mmap, int, int], T],
        decode: Callable[[], tuple[Sequence[Buffer], T]],
    ) -> T | None:
        """Do as `read` does, but return None if another process is decoding the block."""
        try:
            return self._read(name, offset, take, decode, can_wait=False)
        except _BusyError:
            return None

    def _read(
        self,
        name: str,
        offset: int,
        take: Callable[[mmap.mmap, int, int], T],
        decode: Callable[[], tuple[Sequence[Buffer], T]],
        *,
        can_wait: bool,
    ) -> T:
        digest = blake2b(f"{offset} {name}".encode(), digest_size=16).digest()
        key, check = (int(value) for value in np.frombuffer(digest, np.int64) & (_MAX_KEY - 1))
        try:
            part = self._find(key, check, take)
            if part is not None:
                return part
            with self._lock(1 + key, can_wait=can_wait):
                # Another process may have decoded it meanwhile.
                part = self._find(key, check, take)
                if part is not None:
                    return part
                buffers, part = decode()
                self._store(key, check, buffers)
                return part
        except (_OverdueError, _TooLargeError):
            return decode()[1]

    def close(self) -> None:
        """Close the descriptor; the mapping ends with the last view of it. A second call has no effect."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _find(self, key: int, check: int, take: Callable[[mmap.mmap, int, int], T]) -> T | None:
        """Return a part of a block that is in memory, else None.

        Raises:
            _TooLargeError: a process has decoded the block, which is too large for the memory.
        """
        # While this lock is held, nothing in the ring is given to other blocks.
        with self._lock(_DIRECTORY, is_shared=True):
            columns = self._columns
            slots = np.flatnonzero((columns["key"] == key) & (columns["check"] == check) & (columns["state"] >= _READY))
            if not len(slots):
                return None
            slot = int(slots[0])
            if columns["state"][slot] == _TOO_LARGE:
                raise _TooLargeError
            first = self._place(int(columns["start"][slot]))
            return take(self._memory, first, first + int(columns["size"][slot]))

    def _store(self, key: int, check: int, buffers: Sequence[Buffer]) -> None:
        """Copy a block into the ring, or record that it is too large, unless a lock cannot be had in time."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        num_bytes = sum(map(len, views))
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        is_too_large = size > self.max_block_bytes
        if is_too_large:
            views = []
            size = 0
        try:
            with self._lock(_DIRECTORY):
                slot = self._reserve(key, size)
                if slot is None:
                    return
                for name, value in (("key", key), ("check", check), ("size", num_bytes)):
                    self._columns[name][slot] = value
            first = self._place(int(self._columns["start"][slot]))
            for view in views:
                self._memory[first : first + len(view)] = view
                first += len(view)
            with self._lock(_DIRECTORY):
                self._columns["state"][slot] = _TOO_LARGE if is_too_large else _READY
        except _OverdueError:
            # The block is not shared. Its place is reused like that of a killed process.
            return

    def _reserve(self, key: int, size: int) -> int | None:
        """Return a slot of the directory with `size` bytes of the ring; None if another process writes there."""
        columns = self._columns
        start = int(self._end[0])
        if start % self._ring_bytes + size > self._ring_bytes:
            # A block does not go round the end of the ring.
            start += self._ring_bytes - start % self._ring_bytes
        used = columns["state"] != _EMPTY
        overwritten = used & (columns["start"] < start + size - self._ring_bytes)
        if used.all() and not overwritten.any():
            oldest = int(np.argmin(columns["start"]))
            overwritten[oldest] = True
        # Whoever holds the lock of `key` is this process, so another entry of it was left by one that was killed.
        written = overwritten & (columns["state"] == _WRITING) & (columns["key"] != key)
        if any(map(self._is_written, np.flatnonzero(written).tolist())):
            return None
        # A process that is killed here leaves fewer blocks, and none with wrong content.
        columns["state"][overwritten] = _EMPTY
        slot = int(np.argmin(columns["state"]))
        self._end[0] = start + size
        columns["start"][slot] = start
        columns["state"][slot] = _WRITING
        return slot

    def _is_written(self, slot: int) -> bool:
        """Return True if the process that writes a block still exists."""
        byte = 1 + int(self._columns["key"][slot])
        try:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, byte)
        except OSError:
            return True
        self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
        return False

    def _place(self, start: int) -> int:
        """Return the place in the memory of a position of the ring."""
        return HEADER_BYTES + start % self._ring_bytes

    @contextmanager
    def _lock(self, byte: int, *, is_shared: bool = False, can_wait: bool = True) -> Iterator[None]:
        """Hold the lock of a byte; the kernel releases it when the process ends.

        Raises:
            _OverdueError: another process has held it for too long.
            _BusyError: another process holds it, and this one does not wait.
        """
        self._acquire(byte, fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK, can_wait=can_wait)
        try:
            yield
        finally:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def _acquire(self, byte: int, kind: int, *, can_wait: bool) -> None:
        """Lock a byte. Try repeatedly instead of blocking, because a process that is stopped keeps its locks.

        Many readers that take turns would keep a writer of the directory waiting, so they pause once when one waits.
        """
        is_overdue = not self._is_usable or byte in self._overdue
        deadline = time.monotonic() + (0 if is_overdue else self._patience_s)
        pause_s = MIN_PAUSE_S
        is_writer = byte == _DIRECTORY and kind == fcntl.F_WRLCK
        if byte == _DIRECTORY and not is_writer and self._writer_ns[0] > time.monotonic_ns():
            time.sleep(MAX_PAUSE_S)
        while True:
            try:
                self._control(fcntl.F_OFD_SETLK, kind, byte)
                if is_writer:
                    self._writer_ns[0] = 0
                return
            except (BlockingIOError, PermissionError):
                if not can_wait and not is_overdue:
                    raise _BusyError from None
                if time.monotonic() >= deadline:
                    break
            if is_writer:
                # This time passes also if this process is killed.
                self._writer_ns[0] = time.monotonic_ns() + int(MAX_PAUSE_S * 1e9)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_WRITER_PAUSE_S if is_writer else MAX_PAUSE_S)
        if not is_overdue:
            logger.warning(
                "Another process of this node has used shared memory for %.0f s: it is stopped or very slow. "
                "This process makes what it needs itself.",
                self._patience_s,
            )
        self._overdue.add(byte)
        self._is_usable = self._is_usable and byte != _DIRECTORY
        raise _OverdueError

    def _control(self, command: int, kind: int, byte: int) -> None:
        # struct flock of 64-bit Linux: type, whence, start, length, process.
        fcntl.fcntl(self._fd, command, struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))


class _OverdueError(Exception):
    """Raised when another process holds a lock for too long."""


class _TooLargeError(Exception):
    """Raised instead of waiting for the decoding of a block that the memory does not keep."""


class _BusyError(Exception):
    """Raised instead of waiting for a lock."""


def _lines_in(memory: mmap.mmap, first: int, rows: Ints) -> list[bytes]:
    """Return some rows of a block: the number of its rows, the end of each, and all lines."""
    num_rows = int.from_bytes(memory[first : first + 8], "little")
    ends = np.frombuffer(memory, np.int64, num_rows, first + 8)
    base = first + 8 + ends.nbytes
    starts = np.where(rows > 0, ends[rows - 1], 0) + base
    places = zip(starts.tolist(), (ends[rows] + base).tolist(), strict=True)
    return [memory[start:end] for start, end in places]
