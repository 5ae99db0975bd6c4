"""Print the progress of a training run: one line about every two seconds, from rank 0, on standard error.

Every line has the time (UTC), the rank and the step, so that the logs of several ranks can be merged.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from mixtera_hpc.errors import pluralize

__all__ = ["ProgressPrinter"]

INTERVAL_S = 2.0
"""Shortest time between two lines about steps."""


class ProgressPrinter:
    """A tracker for command-line programs that prints metric events, and reports every step of this rank.

    Programs that use the package as a library pass their own tracker instead.
    """

    def __init__(self, num_steps: int, on_step: Callable[[int], None]) -> None:
        """Print nothing yet.

        Args:
            num_steps: of the whole run.
            on_step: called by the trainer after every step of this rank, as `step`.
        """
        self.step = on_step
        self._num_steps = num_steps
        self._printed_s = 0.0

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        if stream == "attempts":
            self._print(int(event["step"]), _attempt_text(event))
        elif stream == "validation":
            loss = event["loss"]
            text = "no held-out loss" if loss is None else f"held-out loss {loss:.4f}"
            self._print(int(event["step"]), text)
        elif stream == "steps" and self._is_due(int(event["step"])):
            self._print(int(event["step"]) + 1, _step_text(event))

    def close(self) -> None:
        return None

    def _is_due(self, step: int) -> bool:
        """Return True if a line about `step` may be printed now. The last step is always printed."""
        now = time.monotonic()
        if now - self._printed_s < INTERVAL_S and step + 1 < self._num_steps:
            return False
        self._printed_s = now
        return True

    def _print(self, step: int, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        sys.stderr.write(f"{stamp} rank 0 step {step} of {self._num_steps}: {text}\n")
        sys.stderr.flush()


def _attempt_text(event: Mapping[str, Any]) -> str:
    lanes = f", {pluralize(event['lanes'], 'lane')}" if event.get("lanes") else ""
    return (
        f"starts: {pluralize(event['num_ranks'], 'rank')} on {pluralize(event['num_nodes'], 'node')}, "
        f"{event['device']}, {event['num_parameters'] / 1e6:.2f} M parameters, "
        f"{pluralize(len(event['domains']), 'domain')}{lanes}"
    )


def _step_text(event: Mapping[str, Any]) -> str:
    loss = "no loss" if event["loss"] is None else f"loss {event['loss']:.4f}"
    wait = event["data_wait_s"] / event["step_s"] if event["step_s"] else 0.0
    return f"{loss}, {event['tokens_per_s']:,.0f} tokens/s, waited {wait:.1%} for data"
