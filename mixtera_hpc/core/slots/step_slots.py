"""The sequences of several steps, concatenated, and where every step begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mixtera_hpc.core.slots.segment_order import Slots

__all__ = ["StepSlots", "joined_slots"]


@dataclass(frozen=True, slots=True)
class StepSlots:
    """The sequences of some steps, one step after the other."""

    together: Slots
    """The sequences of all steps."""
    borders: Sequence[int]
    """First sequence of every step, then the number of all; shape (num_steps + 1,)."""

    @classmethod
    def of_steps(cls, steps: Sequence[Slots]) -> "StepSlots":
        """Join the sequences of some steps. The result has `Slots.sequence` only if all of them have it."""
        return cls(joined_slots(steps), list(accumulate((len(slots.domain) for slots in steps), initial=0)))

    @classmethod
    def joined(cls, parts: Sequence["StepSlots"]) -> "StepSlots":
        """Join the steps of one or more chunks."""
        if len(parts) == 1:
            return parts[0]
        together = joined_slots([part.together for part in parts])
        sizes = (end - begin for part in parts for begin, end in pairwise(part.borders))
        return cls(together, list(accumulate(sizes, initial=0)))

    def steps(self) -> list[Slots]:
        """Return the sequences of each step."""
        return [self.together.select(slice(begin, end)) for begin, end in pairwise(self.borders)]


def joined_slots(parts: Sequence[Slots]) -> Slots:
    """Return the sequences of all parts, in order. The result has `Slots.sequence` only if all of them have it."""
    if len(parts) == 1:
        return parts[0]
    sequence = [slots.sequence for slots in parts if slots.sequence is not None]
    return Slots(
        domain=np.concatenate([np.zeros(0, np.int32), *(slots.domain for slots in parts)]),
        ordinal=np.concatenate([np.zeros(0, np.int64), *(slots.ordinal for slots in parts)]),
        sequence=np.concatenate([np.zeros(0, np.int64), *sequence]) if len(sequence) == len(parts) else None,
    )
