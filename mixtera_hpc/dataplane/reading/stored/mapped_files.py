"""Files of token ids, mapped into memory and addressed as one array.

All mapped files of one integer type are views of a single numpy array that spans the addresses between them. One index
array therefore reaches the tokens of any number of files in one call. The array also covers addresses that belong to
nobody, so every range of tokens must have been compared with the size of its file (`MappedFiles.num_bytes`).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.file_memory import map_descriptor, release_pages, request_pages, shared_bytes, spanning_memory
from mixtera_hpc.formats.shard_errors import cannot_open_error

__all__ = ["MAX_MAPPED_FILES", "FilesMemory", "MappedFiles", "file_groups", "map_array"]

Ints = NDArray[np.int64]


MAX_MAPPED_FILES = 1 << 14
"""Files that one reader keeps mapped. Linux allows a process 65,530 mappings by default (`vm.max_map_count`). There are
two readers, one of the training data and one of the data held out, and libraries use some mappings too."""
MAX_RESIDENT_BYTES = 1 << 32
RELEASE_EVERY_S = 30.0
"""If a process holds more memory of mapped files than `MAX_RESIDENT_BYTES`, it releases all of it, at most this often.
The pages of the windows in use come back from the page cache, within milliseconds to 0.2 s."""


def map_array(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a file into memory as one array, without the rest if it was truncated inside an item.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = map_descriptor(descriptor)
            return content[: len(content) - len(content) % dtype.itemsize].view(dtype)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_open_error(path, error) from None


def file_groups(files: NDArray[np.integer[Any]]) -> list[NDArray[np.intp] | slice]:
    """Return groups of the positions in `files`, each with so many different files that all of them can be mapped."""
    if len(files) <= MAX_MAPPED_FILES:
        return [slice(None)]
    distinct = np.unique(files)
    if len(distinct) <= MAX_MAPPED_FILES:
        return [slice(None)]
    group = np.searchsorted(distinct, files) // MAX_MAPPED_FILES
    return [np.flatnonzero(group == number) for number in range(int(group.max()) + 1)]


@dataclass(frozen=True, slots=True)
class FilesMemory:
    """All mapped files of one integer type."""

    tokens: NDArray[Any]
    """The memory from the first token of the file with the lowest address to the last token of that with the highest.
    Read only what belongs to a file, or position 0. The files stay mapped as long as a view of it exists."""
    first: Ints
    """Position of the first token of each file; meaningless for files that are not mapped, or have another type."""


class MappedFiles:
    """Files that are mapped when they are first needed; the least recently used are unmapped. Not thread-safe."""

    def __init__(
        self, num_files: int, map_file: Callable[[int], NDArray[Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Map nothing yet.

        Args:
            num_files: files are numbered from 0 to `num_files` - 1.
            map_file: returns the token ids of the file of a number, mapped into memory.
            clock: returns seconds.
        """
        self._map_file = map_file
        self._files: dict[int, NDArray[Any]] = {}
        self._types: list[np.dtype[Any]] = []
        """The integer types of all files so far; a type has the number of its position."""
        self._memory: dict[int, FilesMemory] = {}
        """Type → its files. Emptied when a file is mapped or unmapped."""
        # One entry per file; meaningless for files that are not mapped, but for the number of bytes.
        self._is_mapped = np.zeros(num_files, np.bool_)
        self._last_use = np.zeros(num_files, np.int64)
        self._address = np.zeros(num_files, np.int64)
        self._num_bytes = np.zeros(num_files, np.int64)
        self._type = np.zeros(num_files, np.int8)
        self._num_calls = 0
        self._mapped_bytes = 0
        """Size of all mapped files."""
        self._clock = clock
        self._next_release_s = 0.0

    def distinct(self, files: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
        """Return the different numbers among `files`, ascending."""
        # O(files) without a sort: a read names thousands of documents of few files.
        is_used = np.zeros(len(self._type), np.bool_)
        is_used[files] = True
        return np.flatnonzero(is_used)

    def map(self, files: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
        """Map all of `files`, which may repeat, and return the number of each one's integer type.

        They stay mapped until the next call, if they are at most `MAX_MAPPED_FILES` different ones.
        """
        self._num_calls += 1
        self._last_use[files] = self._num_calls
        is_mapped = self._is_mapped[files]
        if not is_mapped.all():
            new = np.unique(files[~is_mapped]).tolist()
            self._make_room(len(new))
            for number in new:
                self._map_one(number)
        types: NDArray[np.int8] = self._type[files]
        return types

    def item_sizes(self, files: NDArray[np.integer[Any]]) -> Ints:
        """Return the bytes of a token of each file, which are mapped now if there is room for all of them."""
        types = self.map(files)
        return np.array([dtype.itemsize for dtype in self._types], np.int64)[types]

    def num_bytes(self, files: Any) -> Any:
        """Return the size of each of some files, or of one; 0 for those that were never mapped."""
        return self._num_bytes[files]

    def is_mapped(self, files: Any) -> Any:
        """Return a mask of the files, among some, that are mapped."""
        return self._is_mapped[files]

    def addresses(self, files: NDArray[np.integer[Any]]) -> Ints:
        """Return the address of the first byte of each of some mapped files."""
        addresses: Ints = self._address[files]
        return addresses

    def request(
        self, files: NDArray[np.integer[Any]], first: Ints, num_bytes: Ints
    ) -> tuple[NDArray[np.bool_], list[int]]:
        """Let the file system begin to read ranges of mapped files, all at the same time and nothing around them.

        Args:
            files: the file of each range.
            first: the first byte of each range in its file.
            num_bytes: bytes of each range.

        Returns:
            Mask of the ranges that are not empty and inside their file, which a damaged index may contradict, and the
            addresses of these ranges.
        """
        is_inside = (first >= 0) & (num_bytes > 0) & (first + num_bytes <= self._num_bytes[files])
        addresses = (self._address[files] + first)[is_inside].tolist()
        for address, size in zip(addresses, num_bytes[is_inside].tolist(), strict=True):
            request_pages(address, size)
        return is_inside, addresses

    def tokens_at(self, files: NDArray[np.integer[Any]], tokens: Ints) -> Ints:
        """Return single tokens of mapped files, given their positions in the files."""
        ids = np.empty(len(files), np.int64)
        types = self._type[files]
        for number in np.unique(types).tolist():
            own = np.flatnonzero(types == number)
            memory = self.memory(number)
            ids[own] = memory.tokens[memory.first[files[own]] + tokens[own]]
        return ids

    def memory(self, type_number: int) -> FilesMemory:
        """Return all mapped files of a type as one array."""
        if type_number not in self._memory:
            dtype = self._types[type_number]
            files = np.flatnonzero(self._is_mapped & (self._type == type_number))
            # From the lowest address of a file of this type to the highest.
            low = int(self._address[files].min())
            # One token stands for an empty file.
            high = int((self._address[files] + np.maximum(self._num_bytes[files], dtype.itemsize)).max())
            tokens = spanning_memory(low, high, tuple(self._files.values())).view(dtype)
            self._memory[type_number] = FilesMemory(tokens, (self._address - low) // dtype.itemsize)
        return self._memory[type_number]

    def limit_memory(self) -> bool:
        """Release the pages of all files if the process holds too many; see `MAX_RESIDENT_BYTES`. Return True if so.

        A page that was read once counts as memory of the process until then. A job whose memory is limited by such
        counts would be killed when it has read that much. The files stay mapped.
        """
        if self._mapped_bytes <= MAX_RESIDENT_BYTES:
            return False
        now_s = self._clock()
        if now_s < self._next_release_s:
            return False
        self._next_release_s = now_s + RELEASE_EVERY_S
        if shared_bytes() <= MAX_RESIDENT_BYTES:
            return False
        files = np.flatnonzero(self._is_mapped)
        for address, size in zip(self._address[files].tolist(), self._num_bytes[files].tolist(), strict=True):
            release_pages(address, size)
        return True

    def close(self) -> None:
        """Unmap all files."""
        self._memory.clear()
        self._files.clear()
        self._is_mapped[:] = False
        self._mapped_bytes = 0

    def _make_room(self, num_new: int) -> None:
        """Unmap the files that were not used for longest, but none that the current call has requested."""
        excess = len(self._files) + num_new - MAX_MAPPED_FILES
        if excess <= 0:
            return
        unused = np.flatnonzero(self._is_mapped & (self._last_use < self._num_calls))
        oldest = unused[np.argsort(self._last_use[unused], kind="stable")][:excess]
        self._memory.clear()
        for number in oldest.tolist():
            del self._files[number]
        self._is_mapped[oldest] = False
        self._mapped_bytes -= int(self._num_bytes[oldest].sum())

    def _map_one(self, number: int) -> None:
        ids = self._map_file(number)
        self._num_bytes[number] = ids.nbytes
        # An empty file has no memory; one token stands for it.
        self._files[number] = ids = ids if len(ids) else np.zeros(1, ids.dtype)
        if ids.dtype not in self._types:
            self._types.append(ids.dtype)
        self._type[number] = self._types.index(ids.dtype)
        self._address[number] = ids.ctypes.data
        self._is_mapped[number] = True
        self._mapped_bytes += int(self._num_bytes[number])
        self._memory.clear()
