"""Schedules: which stage of a mixture holds at a position of the run, and how one stage blends into the next.

A schedule is a list of starts in ascending order, in steps or in tokens, and the shape of the transition between them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["ScheduleShape", "StageBlend", "blend_at"]

ScheduleShape = Literal["stepwise", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBlend:
    """The stages that a position lies between."""

    stage: int
    """Number of the stage that holds at the position."""
    share_of_next: float
    """Share of the stage after it, in [0, 1]; 0 means that the next stage is not needed."""


def blend_at(starts: Sequence[float], shape: ScheduleShape, position: float) -> StageBlend:
    """Return which stages hold at `position`, in the unit of `starts`.

    Args:
        starts: ascending; a position before the first start belongs to the first stage.
        shape: `stepwise` switches at each start; `linear` and `cosine` move gradually between two starts.
    """
    stage = max((i for i, start in enumerate(starts) if start <= position), default=0)
    if shape == "stepwise" or stage + 1 == len(starts):
        return StageBlend(stage=stage, share_of_next=0.0)

    # Progress from the start of this stage to the start of the next one, in [0, 1].
    start = starts[stage]
    end = starts[stage + 1]
    progress = min(max((position - start) / (end - start), 0.0), 1.0)
    # The cosine shape leaves one stage and arrives at the next with slope 0.
    share = progress if shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return StageBlend(stage=stage, share_of_next=share)
