"""Events flattened to named numbers, as TensorBoard and W&B want them."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ScalarFlattener"]


class ScalarFlattener:
    """`{"loss": 1.5, "domain_loss": [1, 2]}` of stream `steps` → `steps/loss`, `steps/domain_loss/<domain>`.

    Domain names come by with the `attempts` event; until then, and for lists of another length, positions stand in.
    """

    def __init__(self) -> None:
        self._domains: Sequence[str] = ()

    def flatten(self, stream: str, event: Mapping[str, Any]) -> dict[str, float]:
        """Every finite number of `event` but `step`, by name."""
        if stream == "attempts":
            self._domains = list(event.get("domains", ()))
        return {name: value for name, value in self._named(stream, event) if value == value}

    def _named(self, stream: str, event: Mapping[str, Any]) -> list[tuple[str, float]]:
        found = []
        for key, value in event.items():
            if _is_number(value) and key != "step":
                found.append((f"{stream}/{key}", float(value)))
            elif not isinstance(value, str) and hasattr(value, "__len__"):
                labels = self._domains if len(self._domains) == len(value) else range(len(value))
                pairs = zip(labels, value, strict=True)
                found += [(f"{stream}/{key}/{label}", float(item)) for label, item in pairs if _is_number(item)]
        return found


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool) and not hasattr(value, "__len__")
