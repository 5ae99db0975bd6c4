"""An era of a run: what holds from one surgery to the next.

Training counts steps; plans count *data steps*. The two are the same until `resume --skip-steps` passes data over: then a
later training step takes the data of a later data step, and everything about plans stays as it was. After `resume --drop`
a domain's stream is a shorter one, and `origins` says where in it the run goes on. Price: one integer per domain.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["StreamVersion"]

Ints = NDArray[np.int64]
StepRange = tuple[int, int]
"""First and last data step that is passed over."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamVersion:
    """How training steps and stream positions are counted; a run begins with `StreamVersion.start`."""

    number: int
    """Surgeries behind it."""
    skips: tuple[StepRange, ...]
    """Disjoint and ascending."""
    origins: Ints
    """Item of each domain's stream at which its sequence 0 would begin; below 0 where surgery shortened it. Shape (K,)."""
    items: int = 0
    """Items that data step 0 would have had before it, had all steps been as large as they are now: where schedules by tokens count from."""

    @classmethod
    def start(cls, num_domains: int) -> "StreamVersion":
        return cls(number=0, skips=(), origins=np.zeros(num_domains, np.int64))

    def data_step(self, step: int) -> int:
        """The data step whose data training step `step` takes."""
        for first, last in self.skips:
            if step < first:
                break
            step += last - first + 1
        return step

    def step_at(self, data_step: int) -> int:
        """The training step that takes `data_step`, or the first one after it that is not passed over."""
        return data_step - sum(min(last + 1, data_step) - first for first, last in self.skips if first < data_step)

    def is_skipped(self, data_step: int) -> bool:
        """Whether no training step takes `data_step`."""
        return any(first <= data_step <= last for first, last in self.skips)

    def with_skips(self, more: Iterable[StepRange]) -> "StreamVersion":
        """Pass over these data steps too; they may overlap with what is passed over already."""
        merged: list[StepRange] = []
        for first, last in sorted([*self.skips, *more]):
            if merged and first <= merged[-1][1] + 1:
                first, last = merged[-1][0], max(last, merged.pop()[1])
            merged.append((first, last))
        return replace(self, skips=tuple(merged))

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "number": self.number,
            "skips": [list(s) for s in self.skips],
            "origins": self.origins.tolist(),
            "items": self.items,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StreamVersion":
        """The inverse of `to_dict`."""
        return cls(
            number=data["number"],
            skips=tuple((first, last) for first, last in data["skips"]),
            origins=np.array(data["origins"], np.int64),
            items=data["items"],
        )
