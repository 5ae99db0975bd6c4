"""Limits on the length of sequences and the size of batches: what fits into the memory of a node.

A rank holds whole sequences, and some batches of them. If these arrays alone take more than the memory of its node, the
run would be killed without a message, so it is refused before anything is recorded.
"""

import os

from mixtera_hpc.config.batch_ramp import sizes_from
from mixtera_hpc.config.schema import DataPlaneConfig, MixtureConfig
from mixtera_hpc.errors import ConfigError

__all__ = ["check_batch_memory", "memory_of_node", "size_problems"]

BYTES_PER_TOKEN = 13
"""Token id (8), document (4) and loss mask (1) in a `Batch`."""

MAX_SEQ_LEN = 1 << 27
"""Tokens, 134 million: more than any published context. Every rank holds whole sequences."""

MAX_STEP_TOKENS = 1 << 34
"""Tokens of one step over all ranks, 17 billion: a thousand times those of the largest published runs."""


def size_problems(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    """Return what is beyond the size of any training, whatever the machine."""
    if plane.seq_len > MAX_SEQ_LEN:
        return [
            f"dataplane.seq_len is {plane.seq_len}, expected at most {MAX_SEQ_LEN} (2**27) tokens: every rank holds "
            "whole sequences. Lower it."
        ]
    if mixture.unit != "tokens":
        return []
    return [
        f"{key} is {size}, which with dataplane.seq_len={plane.seq_len} is {size * plane.seq_len:.3g} tokens per step. "
        f"At most {MAX_STEP_TOKENS} (2**34) are accepted. Lower one of them."
        for key, size in sizes_from(plane).items()
        if size * plane.seq_len > MAX_STEP_TOKENS
    ]


def memory_of_node() -> int | None:
    """Return the bytes of memory of this node; None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def check_batch_memory(
    plane: DataPlaneConfig, num_groups: int, *, ranks_on_node: int = 1, memory_bytes: int | None = None
) -> None:
    """Refuse batches of tokens that do not fit into the memory of a node.

    Args:
        plane: the settings of the data plane.
        num_groups: groups of ranks that get different sequences.
        ranks_on_node: ranks that this node has, at least.
        memory_bytes: memory of the node; None for that of this one.

    Raises:
        ConfigError: the batches alone take more than the memory.
    """
    memory = memory_of_node() if memory_bytes is None else memory_bytes
    # Those that are ready, and that of the trainer.
    num_batches = plane.prefetch_batches + 1
    for key, size in sizes_from(plane).items():
        # A past stage of a batch ramp may not be shared evenly.
        sequences = max(size // num_groups, 1)
        needed = sequences * plane.seq_len * BYTES_PER_TOKEN * num_batches * ranks_on_node
        if memory is not None and needed > memory:
            raise ConfigError(
                f"dataplane.seq_len={plane.seq_len} and {key}={size} need {needed / 1e9:.3g} GB of memory on this node "
                f"for batches, which has {memory / 1e9:.3g} GB: {num_batches} batches (dataplane.prefetch_batches + 1) "
                f"of {sequences} sequences on each rank.\n"
                f"  Lower dataplane.seq_len or {key}, or use more nodes."
            )
