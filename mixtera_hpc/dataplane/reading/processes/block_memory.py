"""Memory for decoded blocks, and for built windows, that all processes which read on a node share.

`formats.codecs.shared_blocks` and `reading.lookup.shared_windows` use it.

The first rank of a node creates it, without a name, and the others open it as they open the tables of the index. Ranks
that cannot see each other decode and build for themselves.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.processes.table_memory import BLOCKS_NAME, NONCE_BYTES, WINDOWS_NAME, share_memory
from mixtera_hpc.formats.codecs.shared_blocks import SharedBlocks
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["SHARED_SHARE", "BlockMemory", "share_blocks", "share_windows"]

SHARED_SHARE = 0.5
"""Part of `data.cache_bytes` that blocks in shared memory may take; the rows of all processes have the rest."""
WINDOW_BYTES = 64 << 20
"""Memory of a node for windows, about 400 of them: more than its ranks build for one read."""


class BlockMemory:
    """A descriptor of the memory; it is closed when nothing refers to this object any more."""

    def __init__(self, fd: int) -> None:
        """Own a descriptor."""
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    def __reduce__(self) -> Any:
        """Pickle for a process that inherits the descriptor."""
        return BlockMemory, (self.fd,)


def share_blocks(
    comm: Communicator, config: Config, formats: Sequence[str], readers_per_node: int
) -> BlockMemory | None:
    """Return memory for decoded blocks; None where nothing is decoded, or one process reads. **Collective.**

    Args:
        comm: all ranks of the job.
        config: the configuration of the run.
        formats: the format of every shard.
        readers_per_node: processes that read on the node of this rank.
    """
    if not any(map(decodes_blocks, set(formats))):
        return None
    max_bytes = int(config.data.cache_bytes * SHARED_SHARE)
    return _share(comm, BLOCKS_NAME, max_bytes, readers_per_node)


def share_windows(comm: Communicator, readers_per_node: int) -> BlockMemory | None:
    """Return memory for built windows; None where one process reads. **Collective.**"""
    return _share(comm, WINDOWS_NAME, WINDOW_BYTES, readers_per_node)


def _share(comm: Communicator, name: str, max_bytes: int, readers_per_node: int) -> BlockMemory | None:
    def create(nonce: int) -> int:
        fd = os.memfd_create(name)
        try:
            # Pages are allocated when they are written.
            os.ftruncate(fd, SharedBlocks.memory_bytes(max_bytes))
            os.pwrite(fd, nonce.to_bytes(NONCE_BYTES, "little"), 0)
            # Raises an error without /proc, through which every reader opens it again for locks of its own.
            SharedBlocks(fd).close()
        except OSError:
            os.close(fd)
            raise
        return fd

    fd = share_memory(comm, create if readers_per_node > 1 else None)
    return None if fd < 0 else BlockMemory(fd)
