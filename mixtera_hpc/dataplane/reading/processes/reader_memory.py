"""Memory that the processes of a node share while they read the samples of one run."""

from dataclasses import dataclass

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.processes.block_memory import SHARED_SHARE, BlockMemory, share_blocks, share_windows
from mixtera_hpc.dataplane.reading.processes.process_choice import may_use_processes
from mixtera_hpc.dataplane.reading.processes.table_memory import TableMemory, share_tables
from mixtera_hpc.dataplane.reading.shared_index import IndexDescription, SharedTables
from mixtera_hpc.dataplane.reading.unchanged.shard_stamps import ShardStamps, share_stamps

__all__ = ["ReaderMemory", "share_reader_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderMemory:
    """Shared memory of the processes that read on one node; each part is None where the processes do not share it."""

    num_readers: int = 1
    """Ranks and worker processes of the node, which share `data.cache_bytes`."""
    tables: TableMemory | None = None
    """The tables of the index; without it, other processes get a copy."""
    blocks: BlockMemory | None = None
    """Decoded blocks; without it, every process decodes for itself."""
    windows: BlockMemory | None = None
    """Built windows; without it, every process builds its own."""
    shard_stamps: ShardStamps | None = None
    """Look-ups of shards; without it, every process makes its own."""

    def descriptors(self) -> list[int]:
        """Return the file descriptors that a reading process inherits."""
        parts = (self.tables, self.blocks, self.windows, self.shard_stamps)
        return [part.fd for part in parts if part is not None]

    def cache_bytes_per_reader(self, node_bytes: int) -> int:
        """Return the bytes for decoded rows in each process, given `data.cache_bytes` of the node."""
        own_share = 1.0 if self.blocks is None else 1.0 - SHARED_SHARE
        return int(node_bytes * own_share) // self.num_readers


def share_reader_memory(
    comm: Communicator, config: Config, index: IndexDescription, tables: SharedTables
) -> ReaderMemory:
    """Allocate what the reading processes of a node share. **Collective.**"""
    num_readers = comm.local_size * (config.dataplane.workers or 1)
    return ReaderMemory(
        num_readers=num_readers,
        tables=share_tables(comm, tables.pack()) if may_use_processes(config) else None,
        blocks=share_blocks(comm, config, index.shard_formats, num_readers),
        windows=share_windows(comm, num_readers),
        shard_stamps=share_stamps(comm, len(index.shard_paths), num_readers),
    )
