"""The memory that a step of the reference trainer takes at least, compared with that of the node."""

from mixtera_hpc.config.batch_memory import memory_of_node
from mixtera_hpc.config.batch_ramp import sizes_from
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError

__all__ = ["check_model_memory"]

NUMBERS_PER_LAYER = 16
"""Numbers, in units of `training.embedding_dim`, that a layer keeps of every token until the backward pass: two norms
and the residual (3), queries, keys and values (3), attention (2), and the hidden layer before and after gelu (8)."""

FLOAT_BYTES = 4


def check_model_memory(config: Config, num_groups: int) -> None:
    """Refuse micro-batches whose activations do not fit into the memory of this node, if it trains on CPUs.

    Args:
        config: what is trained.
        num_groups: groups of ranks that get different sequences.

    Raises:
        ConfigError: the activations of one micro-batch alone take more than the memory.
    """
    training = config.training
    memory = memory_of_node()
    if memory is None:
        return
    plane = config.dataplane
    per_token = FLOAT_BYTES * NUMBERS_PER_LAYER * training.num_layers * training.embedding_dim
    for key, size in sizes_from(plane).items():
        sequences = max(size // num_groups, 1)
        micro_batch_size = min(training.micro_batch_size or sequences, sequences)
        needed = micro_batch_size * plane.seq_len * per_token
        if needed > memory and _is_on_cpu(training.device):
            raise ConfigError(
                f"dataplane.seq_len={plane.seq_len} and {key}={size} need at least {needed / 1e9:.3g} GB for the "
                f"activations of {micro_batch_size} sequences, but this node has {memory / 1e9:.3g} GB of memory.\n"
                f"  Lower dataplane.seq_len, {key} or training.micro_batch_size, or use more ranks on more nodes."
            )


def _is_on_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    import torch  # Imported here because it takes seconds, and hardly any configuration gets here.

    return torch.cuda.device_count() == 0
