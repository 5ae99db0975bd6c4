"""The version of a run's streams: how training steps and stream positions are counted between two run edits.

Training counts steps; plans count *data steps*. The two are equal until `resume --skip-steps` skips data: from then on
a training step takes the data of a later data step, and plans stay as they were. After `resume --drop` the stream of a
domain is shorter, and `origins`, `begins` and `served` say where in it the run continues. Price: two integers per
domain, and after a drop two more per lane.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import ServedPart

__all__ = ["StepRange", "StreamVersion"]

Ints = NDArray[np.int64]
StepRange = tuple[int, int]
"""First and last data step of a range that is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamVersion:
    """Rules by which training steps and stream positions are counted; a run begins with `StreamVersion.start`."""

    number: int
    """Run edits so far."""
    skips: tuple[StepRange, ...]
    """Skipped data steps; disjoint and ascending."""
    origins: Ints
    """Item of each domain's stream at which its sequence 0 would begin; shape (K,). Negative if a drop shortened the
    stream."""
    begins: Ints
    """Item of each domain's stream from which on it is served since the last drop, 0 before; shape (K,)."""
    served: Mapping[int, ServedPart] = field(default_factory=dict)
    """Domain → what was served, before the last drop, of the epoch in which it happened; none where that is the
    beginning of the epoch."""
    items: int = 0
    """Items that steps of the present size would have served before data step 0, so that a schedule in tokens continues
    where it was after a change of the batch size."""

    @classmethod
    def start(cls, num_domains: int) -> "StreamVersion":
        """Return the version that a run begins with."""
        zeros = np.zeros(num_domains, np.int64)
        return cls(number=0, skips=(), origins=zeros, begins=zeros)

    def has_streams_of(self, other: "StreamVersion") -> bool:
        """Return True if equal served numbers mean equal sequences in both versions."""
        return (
            np.array_equal(self.origins, other.origins)
            and np.array_equal(self.begins, other.begins)
            and self.served == other.served
        )

    def data_step(self, step: int) -> int:
        """Return the data step whose data training step `step` takes."""
        # Skips are ascending, so each one before the step moves it on by its length.
        for first, last in self.skips:
            if step < first:
                break
            step += last - first + 1
        return step

    def step_at(self, data_step: int) -> int:
        """Return the training step that takes `data_step`, or the first data step after it that is not skipped."""
        # Of a skip that reaches beyond `data_step`, only the part before it counts.
        skipped = sum(min(last + 1, data_step) - first for first, last in self.skips if first < data_step)
        return data_step - skipped

    def is_skipped(self, data_step: int) -> bool:
        """Return True if no training step takes `data_step`."""
        return any(first <= data_step <= last for first, last in self.skips)

    def with_skips(self, more: Iterable[StepRange]) -> "StreamVersion":
        """Return this version with more skipped data steps, which may overlap with those skipped already."""
        merged: list[StepRange] = []
        for first, last in sorted([*self.skips, *more]):
            # Skips that touch or overlap become one.
            if merged and first <= merged[-1][1] + 1:
                before_first, before_last = merged.pop()
                merged.append((before_first, max(last, before_last)))
            else:
                merged.append((first, last))
        return replace(self, skips=tuple(merged))

    def to_dict(self) -> dict[str, Any]:
        """Return the version as plain values for JSON."""
        return {
            "number": self.number,
            "skips": [list(skip) for skip in self.skips],
            "origins": self.origins.tolist(),
            "begins": self.begins.tolist(),
            "served": [
                [domain, part.epoch, [list(span) for span in part.ranges]] for domain, part in self.served.items()
            ],
            "items": self.items,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StreamVersion":
        """Parse what `to_dict` returned."""
        return cls(
            number=data["number"],
            skips=tuple((first, last) for first, last in data["skips"]),
            origins=np.array(data["origins"], np.int64),
            begins=np.array(data["begins"], np.int64),
            served={
                domain: ServedPart(epoch=epoch, ranges=tuple((first, last) for first, last in ranges))
                for domain, epoch, ranges in data["served"]
            },
            items=data["items"],
        )
