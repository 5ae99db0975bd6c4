"""Flatten events into named numbers, which is what TensorBoard and W&B record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ScalarFlattener"]


class ScalarFlattener:
    """Convert events to numbers with names like `steps/loss` and `steps/domain_loss/<domain>`.

    The names of the domains are taken from the `attempts` event. Before it, and for lists of another length, positions
    are used instead.
    """

    def __init__(self) -> None:
        self._domains: Sequence[str] = ()

    def flatten(self, stream: str, event: Mapping[str, Any]) -> dict[str, float]:
        """Return every number of `event` except `step` and NaN, by name."""
        if stream == "attempts":
            self._domains = list(event.get("domains", ()))
        return {name: value for name, value in self._named(stream, event) if not math.isnan(value)}

    def _named(self, stream: str, event: Mapping[str, Any]) -> list[tuple[str, float]]:
        named = []
        for key, value in event.items():
            if _is_number(value) and key != "step":
                named.append((f"{stream}/{key}", float(value)))
            elif isinstance(value, Mapping):
                named += [(f"{stream}/{key}/{label}", float(item)) for label, item in value.items()]
            elif not isinstance(value, str) and hasattr(value, "__len__"):
                labels = self._domains if len(self._domains) == len(value) else range(len(value))
                for label, item in zip(labels, value, strict=True):
                    if _is_number(item):
                        named.append((f"{stream}/{key}/{label}", float(item)))
        return named


def _is_number(value: Any) -> bool:
    """Return True for Python and numpy scalars, but not for booleans, arrays and texts."""
    return hasattr(value, "__float__") and not isinstance(value, bool) and not hasattr(value, "__len__")
