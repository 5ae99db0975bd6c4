"""Find numbers below their minimum, and bounds that do not ascend."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

__all__ = ["all_at_least", "at_least", "bounds_problems"]


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


def bounds_problems(path: str, bounds: Any) -> list[str]:
    """Check the bounds of the buckets of a number."""
    is_list = isinstance(bounds, Sequence) and not isinstance(bounds, str) and len(bounds) >= 2
    numbers = [b for b in bounds if isinstance(b, int | float) and not isinstance(b, bool)] if is_list else []
    if not is_list or len(numbers) < len(bounds) or not all(map(math.isfinite, numbers)):
        return [f"{path} is {bounds!r}, expected at least two finite numbers."]
    if any(low >= high for low, high in pairwise(numbers)):
        return [f"{path} is {list(bounds)!r}, expected ascending numbers."]
    return []
