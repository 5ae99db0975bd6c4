"""What a training run says while it goes on: one line every second or so, from rank 0, on standard error.

Every line has the time (UTC), the rank and the step, so that logs of many ranks can be put together.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ProgressPrinter"]

INTERVAL_S = 2.0


class ProgressPrinter:
    """Prints metric events, and passes on every step of this rank."""

    def __init__(self, num_steps: int, on_step: Callable[[int], None]) -> None:
        self.step = on_step
        self._num_steps = num_steps
        self._printed_s = 0.0

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        if stream == "attempts":
            self._say(int(event["step"]), _opening(event))
        elif stream == "validation":
            self._say(
                int(event["step"]),
                "no held-out loss" if event["loss"] is None else f"held-out loss {event['loss']:.4f}",
            )
        elif stream == "steps" and self._due(int(event["step"])):
            self._say(int(event["step"]) + 1, _step(event))

    def close(self) -> None:
        return None

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._printed_s < INTERVAL_S and step + 1 < self._num_steps:
            return False
        self._printed_s = now
        return True

    def _say(self, step: int, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        sys.stderr.write(f"{stamp} rank 0 step {step} of {self._num_steps}: {text}\n")
        sys.stderr.flush()


def _opening(event: Mapping[str, Any]) -> str:
    return (
        f"begins: {event['num_ranks']} ranks on {event['num_nodes']} nodes, {event['device']}, "
        f"{event['num_parameters'] / 1e6:.2f} M parameters, {len(event['domains'])} domains"
    )


def _step(event: Mapping[str, Any]) -> str:
    loss = "no loss" if event["loss"] is None else f"loss {event['loss']:.4f}"
    wait = event["data_wait_s"] / event["step_s"] if event["step_s"] else 0.0
    return f"{loss}, {event['tokens_per_s']:,.0f} tokens/s, waited {wait:.1%} for data"
