"""Choose and open what a rank gets its batches from: a reading thread, processes, or the leader of its group."""

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.delivery.batch_feed import BatchFeed
from mixtera_hpc.dataplane.reading.delivery.group_delivery import FollowingFeed, LeadingFeed
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.processes.process_feed import ProcessFeed
from mixtera_hpc.dataplane.reading.processes.workers import Workers, open_batch_source
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import ConfigError

__all__ = ["check_delivery", "open_feed"]


def check_delivery(source: Source) -> None:
    """Raise ConfigError if batches of `source` cannot be passed on."""
    if not source.layout.in_tokens:
        raise ConfigError(
            "dataplane.delivery=lead passes on tokens, but mixture.unit is samples.\n"
            "  Set dataplane.delivery=each: every rank of a group then reads its samples itself."
        )


def open_feed(source: Source, batch_slice: BatchSlice, group: Communicator | None, ranks_of_node: int) -> BatchFeed:
    """Open what this rank gets its batches from. **Collective** inside the group.

    Args:
        source: what is served.
        batch_slice: what this rank gets of every step.
        group: the ranks that get the same batches; None if no message passes between them.
        ranks_of_node: number of ranks on this node.
    """
    is_passed_on = group is not None and source.config.dataplane.delivery == "lead"
    if group is not None and is_passed_on and not batch_slice.is_group_leader:
        return FollowingFeed(group, source, batch_slice)
    maker = open_batch_source(source, batch_slice, ranks_of_node)
    prefetch_batches = source.config.dataplane.prefetch_batches
    own: BatchFeed
    if isinstance(maker, Workers) and source.layout.in_tokens:
        own = ProcessFeed(maker, prefetch_batches)
    else:
        # Samples of processes come through a socket, which a thread empties.
        own = Prefetcher(maker, prefetch_batches)
    return LeadingFeed(own, group, source, batch_slice) if group is not None and is_passed_on else own
