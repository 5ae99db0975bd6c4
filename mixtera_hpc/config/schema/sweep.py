"""Settings of the group `sweep`: the comparison that `mixtera-hpc sweep` makes."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["SweepConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """The comparison that `mixtera-hpc sweep` makes."""

    scaling: Literal["none", "strong", "weak"] = "none"
    """The batch that stays constant while `job.nodes` or `job.ranks_per_node` grows. `strong`: the global batch.
    `weak`: the batch of a node; `dataplane.global_batch_size` then means the batch of one node. `none`: values are
    not changed."""
    batch_per_node: int | None = None
    """Sequences per node of a run of a weak sweep; `mixtera-hpc sweep` records it."""
