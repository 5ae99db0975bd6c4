"""A line of log now and then, for those who watch a job's output."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Progress"]

EVERY_S = 10.0


class Progress:
    """A `Tracker` that logs, at level INFO, the first event of `steps`, then one every ten seconds."""

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_steps = num_steps
        self._clock = clock
        self._next_s = float("-inf")
        self._logger = logging.getLogger("mixtera_hpc.training")

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        if stream == "steps" and (self._clock() >= self._next_s or event["step"] == self._num_steps - 1):
            self._next_s = self._clock() + EVERY_S
            self._logger.info("%s", self._line(event))

    def close(self) -> None:
        return None

    def _line(self, event: Mapping[str, Any]) -> str:
        loss = "no loss" if event["loss"] is None else f"loss {event['loss']:.4f}"
        waited = event["data_wait_s"] / max(event["step_s"], 1e-9)
        return (
            f"step {event['step'] + 1} of {self._num_steps}, {loss}, {event['tokens_per_s']:,.0f} tokens/s, "
            f"waiting for data {waited:.2%}"
        )
