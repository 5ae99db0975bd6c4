"""The learned values of a mixing algorithm, as the events of chunks record them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.mixing.dynamic_mixer import MixingProblem

__all__ = ["LearningEvent", "LearningLog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningEvent:
    """The state of learning when a chunk begins."""

    hears_losses: bool | None
    """True if losses were recorded recently; None for a mixture that does not learn."""
    described: Mapping[str, NDArray[Any]]
    """Learned values at the time when the algorithm decided the weights of the chunk; shape (K,) each."""
    problem: MixingProblem | None
    """Updates of the algorithm that failed."""


class LearningLog:
    """The state of learning as fields of `mixture.jsonl`.

    An array is recorded when it differs from the one that was recorded last: laws change at refits only.
    """

    def __init__(self) -> None:
        self._recorded: dict[str, NDArray[Any]] = {}
        self.num_problems = 0
        """Failed updates that are recorded."""

    def fields(self, learning: LearningEvent) -> dict[str, Any]:
        """Return the fields of one event."""
        changed = {
            name: values
            for name, values in learning.described.items()
            if name not in self._recorded or not np.array_equal(self._recorded[name], values, equal_nan=True)
        }
        self._recorded.update(changed)
        fields: dict[str, Any] = dict(changed)
        if learning.hears_losses is not None:
            fields["hears_losses"] = learning.hears_losses
        if learning.problem is not None:
            fields["num_failed_updates"] = learning.problem.count
            fields["problem"] = learning.problem.message
        return fields

    def new_problem(self, learning: LearningEvent) -> MixingProblem | None:
        """Return the problem if more updates have failed since the last call."""
        problem = learning.problem
        if problem is None or problem.count == self.num_problems:
            return None
        self.num_problems = problem.count
        return problem
