"""The chunks of a run at which its weights changed, from the journal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixtera_hpc.dataplane.recording.run_history import History

__all__ = ["WeightChange", "find_weight_changes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChange:
    """A chunk whose weights differ from those of the previous chunk."""

    attempt: int
    chunk: int
    step: int
    """First training step of the chunk that this attempt served and no later attempt repeated."""
    domains: Sequence[str]
    """Names of the domains."""
    weights: Sequence[float]
    """Shares of the domains; sum 1."""

    def to_dict(self) -> dict[str, Any]:
        """Return the change as a line of `mixture show --json`."""
        return {
            "kind": "chunk",
            "attempt": self.attempt,
            "chunk": self.chunk,
            "step": self.step,
            "domains": list(self.domains),
            "weights": list(self.weights),
        }


def find_weight_changes(history: History) -> list[WeightChange]:
    """Return the chunks with new weights, in order of steps. Steps that a later attempt repeated do not count."""
    changes: list[WeightChange] = []
    for attempt, steps in history.extents():
        version = attempt.stream_version
        for plan in attempt.plans:
            # Skip a chunk if later attempts repeated all of its steps.
            first_step = max(version.step_at(plan.first_step), steps.start)
            end_step = min(version.step_at(plan.first_step + plan.num_steps), steps.stop)
            if first_step >= end_step:
                continue

            # Comparing with == is exact: plans hold integer weights, and one function quantises them.
            shares = (plan.weights / plan.weights.sum()).tolist()
            if changes and changes[-1].weights == shares:
                continue
            changes.append(
                WeightChange(
                    attempt=attempt.number,
                    chunk=plan.chunk,
                    step=first_step,
                    domains=attempt.identity["domains"],
                    weights=shares,
                )
            )
    return changes
