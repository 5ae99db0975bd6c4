"""What was read of columns lately, for blocks that are wanted time and again: as it is stored, bounded in bytes.

The oldest leaves first, whether used or not: domains come back to blocks at random, so nothing tells which is wanted next. Price:
a look-up per column and block, a tenth of a microsecond where reading takes ten.
"""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

__all__ = ["ColumnCache"]

ENTRY_BYTES = 256
"""What keeping a part takes beside its values."""

Key = tuple[str, int, int]
"""Column, first row, and one past the last."""


class ColumnCache:
    """At most `max_bytes` of them, 0 for none. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._parts: dict[Key, NDArray[Any]] = {}
        self._left_bytes = max_bytes

    def get(self, key: Key, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The part called `key`; `read` brings it when it is not kept."""
        found = self._parts.get(key)
        return self._keep(key, read()) if found is None else found

    def _keep(self, key: Key, part: NDArray[Any]) -> NDArray[Any]:
        self._parts[key] = part
        self._left_bytes -= part.nbytes + ENTRY_BYTES
        while self._left_bytes < 0:
            self._left_bytes += self._parts.pop(next(iter(self._parts))).nbytes + ENTRY_BYTES
        return part
