"""Compare all files that a reading thread reads: its shards with the index, its stores with their state at the start.

Price: 0.2 µs for a check that compares nothing; for one that does, see `shard_guard`, `store_watch` and
`row_store_watch`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.unchanged.comparison_pace import ComparisonPace
from mixtera_hpc.dataplane.reading.unchanged.row_store_watch import RowStoreWatch
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard
from mixtera_hpc.dataplane.reading.unchanged.store_watch import StoreWatch
from mixtera_hpc.errors import DataError

__all__ = ["FileComparison"]


class FileComparison:
    """The comparison of the files of one reading thread. Not thread-safe."""

    def __init__(self, source: Source) -> None:
        """Record the state of the stores; look at no shard yet.

        Raises:
            DataError: a store has been written again since rank 0 checked it.
        """
        index = source.index
        stamps = source.memory.shard_stamps
        self._guard = ShardGuard(index.data_root, index.shard_paths, source.tables.shard_states, stamps)
        row_stores = map(RowStoreWatch, index.row_stores)
        self._watches: list[RowStoreWatch | StoreWatch] = [*row_stores, *map(StoreWatch, index.token_stores)]
        self.pace = ComparisonPace()
        """When files are compared."""

    def use(self, shards: int | NDArray[np.integer[Any]]) -> None:
        """Record that shards are read, given their numbers."""
        self._guard.use(shards)

    def without_record(self) -> AbstractContextManager[None]:
        """Compare as always, but do not count shards as read inside of the context; see `ShardGuard`."""
        return self._guard.without_record()

    def use_mapped(self, shards: NDArray[np.integer[Any]]) -> None:
        """Record that mapped shards are read next, and compare them first if the last comparison was long ago.

        Without it, a file that became shorter would end the process. The comparison after the read stays due.

        Raises:
            DataError: a file has changed.
        """
        self._guard.use(shards)
        if self.pace.is_late():
            self._explain(partial(self.pace.measure, self._compare_all, is_before_read=True))
            self._guard.use(shards)

    def check(self) -> None:
        """Compare the files that were read if `pace` says so, and always those that were never compared.

        Call it after every read, before its batches are delivered.

        Raises:
            DataError: a shard that was read, or a token or row store, has changed.
        """
        if self.pace.is_due():
            self.compare()
        elif self._guard.has_read_new:
            self._explain(self._guard.check_new)

    def compare(self) -> None:
        """Compare the shards that were read, and all stores; raise as `check` does."""
        self._explain(partial(self.pace.measure, self._compare_all))

    def _explain(self, compare: Callable[[], None]) -> None:
        """Call `compare`; if it finds a change, say which batches may hold changed data."""
        try:
            compare()
        except DataError as error:
            # The guard raises its first error again.
            if not hasattr(error, "__notes__"):
                error.add_note(self.pace.exposure())
            raise

    def _compare_all(self) -> None:
        self._guard.check()
        for watch in self._watches:
            watch.check()
