"""Cache ranges of sample columns in their stored type, bounded in bytes.

The oldest entry is evicted first, used or not: a shuffled domain returns to its blocks in random order, so recent use
does not predict the next use. A lookup per column and block costs about 0.1 µs; reading the range costs about 10 µs.
"""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

__all__ = ["ENTRY_BYTES", "ColumnCache"]

ENTRY_BYTES = 256
"""Memory of an entry besides its values."""

Key = tuple[str, int, int]
"""Column name, first row, one past the last row."""


class ColumnCache:
    """Holds at most `max_bytes` of column ranges; 0 disables it. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: dict[Key, NDArray[Any]] = {}
        self._free_bytes = max_bytes

    def get(self, key: Key, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the values of `key`; call `read` for them if they are not cached."""
        values = self._entries.get(key)
        return self._add(key, read()) if values is None else values

    def _add(self, key: Key, values: NDArray[Any]) -> NDArray[Any]:
        self._entries[key] = values
        self._free_bytes -= values.nbytes + ENTRY_BYTES
        # A dict iterates in insertion order, so its first key is the oldest entry. An entry larger than the whole
        # cache evicts everything, itself included, and is still returned.
        while self._free_bytes < 0:
            oldest = next(iter(self._entries))
            self._free_bytes += self._entries.pop(oldest).nbytes + ENTRY_BYTES
        return values
