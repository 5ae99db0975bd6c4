"""Decoded blocks, the most recently used first, bounded in bytes.

For formats whose blocks can only be decoded as a whole (compressed, Parquet). One cache serves all open shards of a rank, so
its bound is the rank's bound. A block wanted by several threads at once is decoded by one of them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["BlockCache"]

T = TypeVar("T")


class BlockCache:
    """Least recently used blocks leave first; the newest stays even when it alone exceeds the bound."""

    def __init__(self, max_bytes: int = 256 << 20, seek_folders: Sequence[Path] = ()) -> None:
        self.max_bytes = max_bytes
        self.seek_folders = tuple(seek_folders)
        """Where seek points of shards may lie that cannot be read at random without."""
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Future[Any], int]] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes held now."""
        return self._size_bytes

    def get(self, key: Hashable, load: Callable[[], tuple[T, int]]) -> T:
        """The block called `key`; `load` decodes it and says how many bytes it takes."""
        with self._lock:
            found = self._entries.get(key)
            if found:
                self._entries.move_to_end(key)
            future: Future[T] = found[0] if found else Future()
            if not found:
                self._entries[key] = (future, 0)
        if not found:
            self._load(key, future, load)
        return future.result()

    def _load(self, key: Hashable, future: "Future[T]", load: Callable[[], tuple[T, int]]) -> None:
        try:
            block, size = load()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            future.set_exception(error)
            return
        with self._lock:
            if key in self._entries:
                self._entries[key] = (future, size)
                self._size_bytes += size
            self._evict(key)
        future.set_result(block)

    def _evict(self, newest: Hashable) -> None:
        """Drop the oldest blocks that are decoded until the rest fits."""
        for key in list(self._entries):
            if self._size_bytes <= self.max_bytes:
                return
            size = self._entries[key][1]
            if size and key != newest:
                del self._entries[key]
                self._size_bytes -= size
