"""Settings of the group `sweep`: what `mixtera-hpc sweep` compares."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["SweepConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """What `mixtera-hpc sweep` compares."""

    scaling: Literal["none", "strong", "weak"] = "none"
    """What stays the same while `job.nodes` or `job.ranks_per_node` grows: with `strong` the global batch, with `weak`
    the batch of a node, which `dataplane.global_batch_size` gives then. `none`: the values are taken as they are."""
    batch_per_node: int | None = None
    """Sequences per node of a run of a weak sweep; `mixtera-hpc sweep` records it."""
