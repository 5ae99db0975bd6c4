"""Memory for batches of tokens that a rank shares with one of its reading processes.

The process writes a batch straight into a slot; the rank gets arrays that refer to it. Nothing is copied, and a slot is
used again once nothing of the rank refers to its arrays. A trainer that holds more batches than there are slots gets
the others through the pipe. Price: 13 bytes per token of a slot, allocated when the slot is first written.
"""

import ctypes
import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchMemory", "MemoryShape", "TokenArrays", "keep_freed_memory"]

ALIGNMENT = 64
"""Bytes of a cache line: arrays begin at one."""
LARGEST_HEAP_BLOCK = (32 << 20) - (64 << 10)
"""Bytes of a block that glibc may take from its heap, at most: 32 MiB with its own header."""


def keep_freed_memory() -> None:
    """Let the allocator of this process keep up to 64 MiB of freed memory at the end of a heap, for the next batches.

    glibc returns this memory to the system when it exceeds twice the largest block that was mapped by itself and freed
    (`M_MMAP_THRESHOLD` in mallopt(3)). The system then clears all pages again, which takes longer than to write a
    batch. To free one large block, which is never written, has the effect. A trainer has nearly always done so before,
    and other allocators are not changed.
    """
    np.empty(LARGEST_HEAP_BLOCK, np.uint8)


class TokenArrays(NamedTuple):
    """The three large arrays of a batch; see `Batch`."""

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    @classmethod
    def new(cls, batch_size: int, length: int) -> "TokenArrays":
        """Return arrays for `batch_size` sequences of `length` tokens, whose content is arbitrary."""
        return cls(
            np.empty((batch_size, length), np.int64),
            np.empty((batch_size, length), np.int32),
            np.empty((batch_size, length - 1), np.bool_),
        )

    def rows(self, count: int) -> "TokenArrays":
        """Return the first `count` rows of the arrays."""
        return TokenArrays(self.tokens[:count], self.document_ids[:count], self.loss_mask[:count])

    def store(self, *content: NDArray[Any]) -> None:
        """Copy the arrays of a batch that are not these ones already."""
        arrays: list[NDArray[Any]] = [self.tokens, self.document_ids, self.loss_mask]
        for own, other in zip(arrays, content, strict=True):
            # A batch that was made here consists of the first rows of these arrays.
            if not np.may_share_memory(own, other):
                own[: len(other)] = other


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShape:
    """The size of a `BatchMemory`."""

    num_slots: int
    batch_size: int
    """Sequences in the largest batch of the run; smaller ones use the first rows of a slot."""
    length: int
    """Tokens in a sequence."""

    @property
    def array_bytes(self) -> list[int]:
        """Bytes of each array of a slot, aligned."""
        tokens = self.batch_size * self.length
        sizes = (8 * tokens, 4 * tokens, tokens - self.batch_size)
        return [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return sum(self.array_bytes)


class BatchMemory:
    """Slots of shared memory, each for one batch. The rank decides which slots are free."""

    def __init__(self, fd: int, shape: MemoryShape) -> None:
        """Map the memory behind a descriptor, which may be closed afterwards."""
        self._shape = shape
        self._memory = mmap.mmap(fd, shape.num_slots * shape.slot_bytes)
        # Appended to when the last reference to a batch disappears, in any thread.
        self._free = deque(range(shape.num_slots))

    @staticmethod
    def create(shape: MemoryShape) -> int:
        """Return the descriptor of new memory. It has no name, so nothing is left behind however processes end."""
        fd = os.memfd_create("mixtera-batches")
        os.ftruncate(fd, shape.num_slots * shape.slot_bytes)
        return fd

    def take(self, count: int) -> list[int]:
        """Return up to `count` free slots, which are then in use."""
        # The slots that were used last first: the memory of a slot that was never used is not allocated.
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def give_back(self, slot: int) -> None:
        """Make a slot free that nothing refers to."""
        self._free.append(slot)

    def lend(self, slot: int) -> TokenArrays:
        """Return the arrays of a slot in use. It is free when neither they nor views of them exist any more."""
        content = self._content(slot)
        # All views of a numpy array refer to its buffer, and not to the array that they were made of.
        release = weakref.finalize(content, self._free.append, slot)
        release.atexit = False
        return self._split(content)

    def arrays(self, slot: int) -> TokenArrays:
        """Return the arrays of a slot, to write to."""
        return self._split(self._content(slot))

    def _content(self, slot: int) -> Any:
        size = self._shape.slot_bytes
        return (ctypes.c_ubyte * size).from_buffer(self._memory, slot * size)

    def _split(self, content: Any) -> TokenArrays:
        shape = self._shape
        tokens_bytes, document_bytes, _ = shape.array_bytes
        num_tokens = shape.batch_size * shape.length
        tokens = np.frombuffer(content, np.int64, num_tokens)
        documents = np.frombuffer(content, np.int32, num_tokens, tokens_bytes)
        mask = np.frombuffer(content, np.bool_, num_tokens - shape.batch_size, tokens_bytes + document_bytes)
        return TokenArrays(
            tokens.reshape(shape.batch_size, shape.length),
            documents.reshape(shape.batch_size, shape.length),
            mask.reshape(shape.batch_size, shape.length - 1),
        )
