"""Times at which the processes of a node found a shard unchanged, so that one look-up can serve several of them.

A look-up covers only reads that ended before it began: the file may have changed after it. So a process trusts the
look-up of another process only if it began after the own read had ended. No process waits for another one. Slow
look-ups are therefore shared by reads that end together, while look-ups that take microseconds are made by each
process. Price: 8 bytes of memory per shard and node, and one small collective when the data is opened.
"""

import mmap
import os
import time
import weakref
from typing import Any

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.dataplane.reading.processes.table_memory import NONCE_BYTES, STAMPS_NAME, share_memory

__all__ = ["ShardStamps", "now_ticks", "share_stamps", "state_digest"]

TICK_BITS = 14
"""Bits of a time in nanoseconds that are dropped: a tick is 16 µs."""
DIGEST_BITS = 20
"""A word of 64 bits holds a tick and a digest, so that one store writes both. Ticks fit for nine years of uptime."""
_DIGEST_MASK = (1 << DIGEST_BITS) - 1
_WORD_BYTES = 8


def now_ticks() -> int:
    """Return the time of this node, in ticks, rounded down."""
    return time.monotonic_ns() >> TICK_BITS


def state_digest(size: int, mtime_ns: int, ctime_ns: int) -> int:
    """Return a digest of the size and times of a file, the same in every process."""
    return hash((size, mtime_ns, ctime_ns)) & _DIGEST_MASK


class ShardStamps:
    """The newest look-up of each shard by any process of this node."""

    def __init__(self, fd: int) -> None:
        """Own the descriptor of the memory; it is closed when nothing refers to this object any more."""
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self._words = memoryview(mmap.mmap(fd, 0))[NONCE_BYTES:].cast("Q")

    def __reduce__(self) -> Any:
        """Pickle for a process that inherits the descriptor."""
        return ShardStamps, (self.fd,)

    def proves(self, shard: int, read_end: int, digest: int) -> bool:
        """Return True if a process found a shard in the state `digest`, by a look-up after the tick `read_end`."""
        word = self._words[shard]
        return word >> DIGEST_BITS > read_end and word & _DIGEST_MASK == digest

    def contradicts(self, shard: int, digest: int) -> bool:
        """Return True if a process accepted a shard in another state than `digest`."""
        word = self._words[shard]
        return word != 0 and word & _DIGEST_MASK != digest

    def record(self, shard: int, began: int, digest: int) -> None:
        """Record that a shard was accepted in the state `digest`, by a look-up that began at the tick `began`."""
        self._words[shard] = began << DIGEST_BITS | digest


def share_stamps(comm: Communicator, num_shards: int, readers_per_node: int) -> ShardStamps | None:
    """Return memory for the stamps of `num_shards` shards; None if one process reads. **Collective.**"""

    def create(nonce: int) -> int:
        fd = os.memfd_create(STAMPS_NAME)
        try:
            # Reserves the memory: a write beyond the limit would kill the process.
            os.posix_fallocate(fd, 0, NONCE_BYTES + _WORD_BYTES * num_shards)
            os.pwrite(fd, nonce.to_bytes(NONCE_BYTES, "little"), 0)
        except OSError:
            os.close(fd)
            raise
        return fd

    fd = share_memory(comm, create if readers_per_node > 1 and num_shards else None)
    return None if fd < 0 else ShardStamps(fd)
