"""Decoded blocks in memory that the processes of a node share: each of them is decoded once per node.

Whoever asks first for a block decodes it, while the others wait for that block. The memory is a ring: a new block takes
the place of the oldest ones. It has no name and its locks belong to open files, so nothing is left behind by a process
that is killed, and a block that it was writing is never served. Price: a few microseconds and one copy per row, and
about 20 µs per decoded block.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEADER_BYTES", "DecodedLines", "SharedBlocks"]

Ints = NDArray[np.int64]

MAX_ENTRIES = 4096
_COLUMNS = ("state", "key", "check", "start", "rows")
_EMPTY, _WRITING, _READY = range(3)
RESERVED_BYTES = 64
"""The memory begins with the end of the ring, behind what its owner writes there."""
HEADER_BYTES = RESERVED_BYTES + 8 * (1 + MAX_ENTRIES * len(_COLUMNS))
MAX_SHARE = 0.25
"""Largest part of the ring for one block."""
ALIGNMENT = 64
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

    def __init__(self, fd: int) -> None:
        """Map the memory behind a descriptor, which may be closed afterwards. New memory is empty."""
        # Locks belong to what is opened here, not to the process: two threads exclude each other, too.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        self._memory = mmap.mmap(self._fd, size)
        numbers = np.frombuffer(self._memory, np.int64, 1 + MAX_ENTRIES * len(_COLUMNS), RESERVED_BYTES)
        self._end = numbers[:1]
        """Bytes that were ever reserved: the ring continues at the rest of a division by its size."""
        self._columns = dict(zip(_COLUMNS, numbers[1:].reshape(len(_COLUMNS), MAX_ENTRIES), strict=True))
        self._first_byte = -(-HEADER_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._ring_bytes = size - self._first_byte

    @staticmethod
    def memory_bytes(max_bytes: int) -> int:
        """Return the size of the memory for blocks of `max_bytes` together."""
        return max_bytes + HEADER_BYTES + mmap.PAGESIZE

    def lines(self, name: str, offset: int, rows: Ints, decode: Callable[[], DecodedLines]) -> list[bytes]:
        """Return some rows of a block.

        Args:
            name: the path of the shard.
            offset: the first byte of the block in the shard.
            rows: positions of the rows inside the block; shape (n,).
            decode: decodes the block. Usually one process of the node calls it.
        """
        digest = blake2b(f"{offset} {name}".encode(), digest_size=16).digest()
        key, check = (int(value) for value in np.frombuffer(digest, np.int64) & (_MAX_KEY - 1))
        lines = self._find(key, check, rows)
        if lines is not None:
            return lines
        with self._lock(1 + key):
            # Another process may have decoded it meanwhile.
            lines = self._find(key, check, rows)
            if lines is not None:
                return lines
            decoded = decode()
            self._store(key, check, decoded)
        starts = np.concatenate([[0], decoded.ends[:-1]])[rows].tolist()
        data = decoded.data
        return [data[start:end] for start, end in zip(starts, decoded.ends[rows].tolist(), strict=True)]

    def close(self) -> None:
        """Close the descriptor; the mapping ends with the last view of it."""
        os.close(self._fd)

    def _find(self, key: int, check: int, rows: Ints) -> list[bytes] | None:
        """Return rows of a block that is in memory, else None."""
        # While this lock is held, nothing in the ring is given to other blocks.
        with self._lock(_DIRECTORY, is_shared=True):
            columns = self._columns
            slots = np.flatnonzero((columns["key"] == key) & (columns["check"] == check) & (columns["state"] == _READY))
            if not len(slots):
                return None
            slot = int(slots[0])
            first = self._place(int(columns["start"][slot]))
            ends = np.frombuffer(self._memory, np.int64, int(columns["rows"][slot]), first)
            base = first + ends.nbytes
            starts = np.where(rows > 0, ends[rows - 1], 0) + base
            places = zip(starts.tolist(), (ends[rows] + base).tolist(), strict=True)
            memory = self._memory
            return [memory[start:end] for start, end in places]

    def _store(self, key: int, check: int, decoded: DecodedLines) -> None:
        """Copy a block into the ring, if there is room for it."""
        size = -(-(decoded.ends.nbytes + len(decoded.data)) // ALIGNMENT) * ALIGNMENT
        if size > self._ring_bytes * MAX_SHARE:
            return
        with self._lock(_DIRECTORY):
            slot = self._reserve(key, size)
            if slot is None:
                return
            for name, value in (("key", key), ("check", check), ("rows", len(decoded.ends))):
                self._columns[name][slot] = value
        first = self._place(int(self._columns["start"][slot]))
        np.frombuffer(self._memory, np.int64, len(decoded.ends), first)[:] = decoded.ends
        begin = first + decoded.ends.nbytes
        self._memory[begin : begin + len(decoded.data)] = decoded.data
        with self._lock(_DIRECTORY):
            self._columns["state"][slot] = _READY

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
        return self._first_byte + start % self._ring_bytes

    @contextmanager
    def _lock(self, byte: int, *, is_shared: bool = False) -> Iterator[None]:
        """Hold the lock of a byte; the kernel releases it when the process ends."""
        self._control(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK, byte)
        try:
            yield
        finally:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def _control(self, command: int, kind: int, byte: int) -> None:
        # struct flock of 64-bit Linux: type, whence, start, length, process.
        fcntl.fcntl(self._fd, command, struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
