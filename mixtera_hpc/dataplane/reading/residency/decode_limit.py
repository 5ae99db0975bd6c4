"""Refuse data that costs more to decode than `data.max_amplification` allows."""

from mixtera_hpc.dataplane.reading.residency.decode_cost import DecodeCost, decode_cost
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import ConfigError

__all__ = ["check_decode_cost", "check_job"]


def check_job(source: Source, num_ranks: int, ranks_per_node: int) -> None:
    """Refuse a job that decodes too much with the weights of its first step.

    Raises:
        ConfigError: names the cures.
    """
    shape = JobShape.of_job(source, num_ranks, ranks_per_node)
    served_per_step = source.weights * source.planner.batch_schedule.size_at(0) * source.grid.stride
    check_decode_cost(source, decode_cost(source, served_per_step, shape))


def check_decode_cost(source: Source, cost: DecodeCost | None) -> None:
    """Refuse a cost above `data.max_amplification`.

    Raises:
        ConfigError: names the cures.
    """
    limit = source.config.data.max_amplification
    if cost is None or cost.amplification <= limit:
        return
    if source.layout.order.shuffle == "sequence":
        raise ConfigError(
            f"dataplane.shuffle=sequence would decode {cost.amplification:,.0f} bytes for every byte served, more than "
            f"data.max_amplification={limit:g}: every sequence decodes whole blocks of files that hold no single rows."
            "\n  Write the tokens once with mixtera-hpc tokenize, or set dataplane.shuffle=window. Or raise "
            "data.max_amplification."
        )
    config = source.config
    memory = ""
    if cost.memory_bytes > config.data.cache_bytes:
        memory = (
            f" data.cache_bytes={config.data.cache_bytes} per node is too small: set "
            f"data.cache_bytes={cost.memory_bytes:.0f}, or lower dataplane.window_bytes or dataplane.lanes."
        )
    raise ConfigError(
        f"This job would decode {cost.amplification:,.1f} bytes for every byte served, more than "
        f"data.max_amplification={limit:g}; at least {cost.lower_bound:.1f} are needed with this layout of the data.\n"
        f" {memory} With more ranks than lanes ({source.lanes.lanes}), set dataplane.lanes to the number of ranks "
        "before the run begins. For tokens, write them once with mixtera-hpc tokenize. Or raise data.max_amplification."
    )
