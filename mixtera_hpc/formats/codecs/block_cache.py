"""An LRU cache of decoded blocks, bounded in bytes.

For formats whose blocks can only be decoded as a whole (compressed files, Parquet). One cache serves all open shards of
a rank, so its bound is the bound of the rank. If several threads request the same block, one of them decodes it and the
others wait.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mixtera_hpc.formats.codecs.shared_blocks import SharedBlocks

__all__ = ["MAX_BLOCK_BYTES", "BlockCache"]

T = TypeVar("T")

MAX_BLOCK_BYTES = 4 << 30
"""Default of `data.max_block_bytes`."""


class BlockCache:
    """Keeps the most recently used blocks. The newest block stays even if it alone exceeds the bound."""

    def __init__(
        self,
        max_bytes: int = 256 << 20,
        seek_folders: Sequence[Path] = (),
        max_block_bytes: int = MAX_BLOCK_BYTES,
        shared: SharedBlocks | None = None,
    ) -> None:
        self.shared = shared
        """Blocks in memory that the processes of a node share; None if each decodes for itself."""
        self.max_bytes = max_bytes
        self.max_block_bytes = max_block_bytes
        """Largest decoded size of a block; readers refuse larger ones before they take the memory."""
        self.seek_folders = tuple(seek_folders)
        """Folders to search for the seek points of shards that need them for random access."""
        self._lock = threading.Lock()
        # Key → (block, its bytes), least recently used first. A block that is still being decoded has 0 bytes.
        self._entries: OrderedDict[Hashable, tuple[Future[Any], int]] = OrderedDict()
        self._size_bytes = 0
        self.loaded_bytes = 0
        """Bytes of all blocks that were decoded so far."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all decoded blocks in the cache."""
        return self._size_bytes

    def get(self, key: Hashable, load: Callable[[], tuple[T, int]]) -> T:
        """Return the block `key`, decoding it if needed.

        Args:
            key: names the block among all blocks of all shards.
            load: decodes the block and returns it with its size in bytes.
        """
        with self._lock:
            entry = self._entries.get(key)
            # The thread that creates the future decodes the block; every other thread waits for its result.
            future: Future[T] = entry[0] if entry is not None else Future()
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                self._entries[key] = (future, 0)

        if entry is None:
            self._load(key, future, load)
        return future.result()

    def _load(self, key: Hashable, future: "Future[T]", load: Callable[[], tuple[T, int]]) -> None:
        """Decode a block outside the lock. An error reaches every waiting thread; the next request tries again."""
        try:
            block, size = load()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            future.set_exception(error)
            return

        # The bytes are known only now, so this is where the bound is enforced.
        with self._lock:
            self.loaded_bytes += size
            if key in self._entries:
                self._entries[key] = (future, size)
                self._size_bytes += size
            self._evict(newest=key)
        future.set_result(block)

    def _evict(self, newest: Hashable) -> None:
        """Drop the least recently used blocks until the others fit; blocks that are being decoded stay."""
        dropped: list[Hashable] = []
        for key, (_, size) in self._entries.items():
            if self._size_bytes <= self.max_bytes:
                break
            if size and key != newest:
                dropped.append(key)
                self._size_bytes -= size
        for key in dropped:
            del self._entries[key]
