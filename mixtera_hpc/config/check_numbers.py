"""Find numbers below their minimum."""

from typing import Any

__all__ = ["all_at_least", "at_least"]


def at_least(name: str, value: float, minimum: int) -> list[str]:
    """Return the problem of a value below its minimum; an empty list if it has none."""
    return [] if value >= minimum else [f"{name} is {value}, expected at least {minimum}."]


def all_at_least(group: str, config: Any, minimum: int, names: tuple[str, ...]) -> list[str]:
    """Return the problems of several fields of one group that have the same minimum. Null has no problem."""
    values = {name: getattr(config, name) for name in names}
    return [
        problem
        for name, value in values.items()
        if value is not None
        for problem in at_least(f"{group}.{name}", value, minimum)
    ]
