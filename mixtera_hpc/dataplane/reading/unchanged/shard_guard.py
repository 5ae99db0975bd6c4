"""Refuse data files that change while a run reads them.

After a read of some steps, each file that was read is looked up once and compared with the index: first its size and
times, and if one of the times is new, its fingerprint (size, first and last MiB). A file with an equal fingerprint is
accepted with its new times. Because the comparison follows the read, it covers the opening and the read itself. If
reads follow each other fast, one comparison covers several of them, see `comparison_pace`. But a file is compared at
once after its first read, where a file that changed before is met.
Processes of a node share look-ups, see `shard_stamps`.
Price: one `stat` of 2 to 4 µs per file and comparison, which the file system's client answers from the memory of the
node while it holds the attributes of the file; two reads of 1 MiB per process and file whose times have changed.

What this cannot see: a change in the middle of a file above 2 MiB whose size and modification time are as before, or
whose size, first and last MiB are; and writes through a memory mapping, until the kernel updates the file's times.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.dataplane.reading.unchanged.shard_stamps import ShardStamps, now_ticks, state_digest
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.shards import fingerprint_of_shard

__all__ = ["ShardGuard", "no_shard_states", "shard_states"]

LOGGER = logging.getLogger("mixtera_hpc")

Ints = NDArray[np.int64]
# Columns of the table of states: the fingerprint of 16 bytes takes two.
_SIZE, _MTIME, _FINGERPRINT = 0, 1, slice(2, 4)
_FINGERPRINT_BYTES = 16
MAX_COMPARISONS = 3
"""Fingerprints that are computed of a file that changes again meanwhile."""


def shard_states(shards: ShardTable) -> Ints:
    """Return what an index knows of its shards: size, modification time, fingerprint; shape (num_shards, 4)."""
    states = np.zeros((len(shards.path), 4), np.int64)
    states[:, _SIZE] = shards.size_bytes
    states[:, _MTIME] = shards.mtime_ns
    digests = b"".join(bytes.fromhex(text).ljust(_FINGERPRINT_BYTES, b"\0") for text in shards.fingerprint)
    states[:, _FINGERPRINT] = np.frombuffer(digests, "<i8").reshape(-1, 2)
    return states


def no_shard_states() -> Ints:
    """Return the table of a source whose shards are not compared."""
    return np.zeros((0, 4), np.int64)


class _Paths(dict[int, str]):
    """Number of a shard → its path. Joined once for each shard that is read, since it takes as long as a comparison."""

    def __init__(self, data_root: str, shard_paths: Sequence[str]) -> None:
        super().__init__()
        self._data_root = data_root
        self._shard_paths = shard_paths

    def __missing__(self, number: int) -> str:
        # The paths of data sets with names are absolute.
        name = self._shard_paths[number]
        self[number] = path = name if name[0] == "/" else f"{self._data_root}/{name}"
        return path


class ShardGuard:
    """The comparison of the shards that one reading thread has read. Not thread-safe."""

    def __init__(
        self, data_root: str, shard_paths: Sequence[str], states: Ints, stamps: ShardStamps | None = None
    ) -> None:
        """Look at nothing yet.

        Args:
            data_root: the folder that `shard_paths` are relative to.
            shard_paths: of all shards.
            states: see `shard_states`; without entries, nothing is compared.
            stamps: the look-ups of all processes of this node; None if this process makes all of its own.
        """
        self._paths = _Paths(data_root, shard_paths)
        self._states = states
        self._is_used = np.zeros(len(states), np.bool_)
        """Mask of the shards that were read since the last comparison."""
        self._is_new = np.ones(len(states), np.bool_)
        """Mask of the shards that were never compared."""
        self._num_new = len(states)
        self.has_read_new = False
        """True if a shard was read that was never compared."""
        self._accepted = np.zeros((len(states), 3), np.int64)
        """Size, modification and change time with which each shard was accepted; 0 before that."""
        self._stamps = stamps
        self._shuffle = np.random.default_rng(os.getpid())
        self._problem: DataError | None = None
        self._has_warned = False

    def use(self, shards: int | NDArray[np.integer[Any]]) -> None:
        """Record that shards are read, given their numbers."""
        if not len(self._is_used):
            return
        self._is_used[shards] = True
        if self._num_new and not self.has_read_new:
            self.has_read_new = bool(self._is_new[shards].any())

    @contextlib.contextmanager
    def without_record(self) -> Iterator[None]:
        """Forget at the end which shards were read inside, and which change was found: they may not be needed."""
        before = self._is_used.copy(), self.has_read_new, self._problem
        try:
            yield
        finally:
            self._is_used, self.has_read_new, self._problem = before

    def check(self) -> None:
        """Compare the shards that were read since they were compared last.

        Raises:
            DataError: one of them has changed. Every later call raises the same: what was read of it may be in memory.
        """
        self._compare(self._is_used)

    def check_new(self) -> None:
        """Compare the shards that were read and never compared; raise as `check` does."""
        self._compare(self._is_used & self._is_new)

    def _compare(self, is_chosen: NDArray[np.bool_]) -> None:
        """Compare the chosen shards."""
        if self._problem is not None:
            raise self._problem
        used = np.flatnonzero(is_chosen)
        if not len(used):
            return
        try:
            if self._stamps is None:
                self._look_up(used)
            else:
                self._look_up_together(used, self._stamps)
        except DataError as error:
            self._problem = error
            # Makes every later check compare, and raise.
            self.has_read_new = True
            raise
        self._is_used[used] = False
        if self.has_read_new:
            self.has_read_new = False
            self._is_new[used] = False
            self._num_new = int(np.count_nonzero(self._is_new))

    def _look_up(self, used: NDArray[np.intp]) -> None:
        """Look up every shard."""
        numbers = used.tolist()
        paths = map(self._paths.__getitem__, numbers)
        # A read may touch thousands of shards, so the common case is a call and three comparisons.
        for number, path, size, mtime, ctime in zip(numbers, paths, *self._accepted[used].T.tolist(), strict=True):
            try:
                status = os.stat(path)  # noqa: PTH116 - pathlib is slow.
            except OSError as error:
                raise _lost_error(path, error) from None
            if status.st_ctime_ns != ctime or status.st_mtime_ns != mtime or status.st_size != size:
                self._accepted[number] = self._state_to_accept(number, path, status, is_first=not ctime)

    def _look_up_together(self, used: NDArray[np.intp], stamps: ShardStamps) -> None:
        """Look up the shards that no other process of this node has looked up since the read ended."""
        read_end = now_ticks()
        # The order differs between processes, so that reads that end together use the look-ups of each other.
        used = self._shuffle.permutation(used)
        for number, size, mtime, ctime in zip(used.tolist(), *self._accepted[used].T.tolist(), strict=True):
            if ctime and stamps.proves(number, read_end, state_digest(size, mtime, ctime)):
                continue
            path = self._paths[number]
            began = now_ticks()
            status = _stat(path)
            if status.st_ctime_ns != ctime or status.st_mtime_ns != mtime or status.st_size != size:
                is_first = not ctime and not stamps.contradicts(number, state_digest(*_size_and_times(status)))
                self._accepted[number] = self._state_to_accept(number, path, status, is_first=is_first)
            stamps.record(number, began, state_digest(*self._accepted[number].tolist()))

    def _state_to_accept(
        self, number: int, path: str, status: os.stat_result, *, is_first: bool
    ) -> tuple[int, int, int]:
        """Return the size and times of a shard whose content is as indexed."""
        size, mtime = self._states[number, : _MTIME + 1].tolist()
        if status.st_size != size:
            raise _changed_error(path, f"it has {status.st_size} bytes, but {size} were indexed")
        # An index holds no change time, so the first look has nothing to compare it with.
        if not is_first or status.st_mtime_ns != mtime:
            status = self._compare_content(number, path, status)
        return _size_and_times(status)

    def _compare_content(self, number: int, path: str, status: os.stat_result) -> os.stat_result:
        """Compare the fingerprint of a file with new times, and return its status, which did not change meanwhile."""
        size = status.st_size
        for _ in range(MAX_COMPARISONS):
            try:
                digest = bytes.fromhex(fingerprint_of_shard(Path(path), size))
            except OSError as error:
                raise _changed_error(path, f"it cannot be read: {error.strerror}") from None
            if digest != self._states[number, _FINGERPRINT].tobytes():
                raise _changed_error(path, "its first or last MiB differs from what was indexed")
            after = _stat(path)
            if _size_and_times(after) == _size_and_times(status):
                if status.st_mtime_ns != int(self._states[number, _MTIME]) and not self._has_warned:
                    # Once per process: a `touch` of all files must not write a line per file and rank.
                    self._has_warned = True
                    LOGGER.warning(
                        "%s has another modification time than in the index. Its size, first and last MiB are the "
                        "same, so the run goes on. Other files of this kind are not named.",
                        path,
                    )
                return status
            status = after
        raise _changed_error(path, "it is being written")


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 - pathlib is slow.
    except OSError as error:
        raise _lost_error(path, error) from None


def _lost_error(path: str, error: OSError) -> DataError:
    return _changed_error(path, f"it cannot be found: {error.strerror}")


def _size_and_times(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed_error(path: str, problem: str) -> DataError:
    return DataError(
        f"{path} has changed while the run reads it: {problem}. Data files must stay as they were indexed until a run "
        "ends.\n"
        "  Restore the file and continue with mixtera-hpc resume; or update the index with mixtera-hpc index refresh, "
        "and start a new run."
    )
