"""Numbers as people read them."""

import math

__all__ = ["format_count", "format_duration", "format_percent", "format_seconds"]


def format_count(value: float | None, digits: int = 3) -> str:
    """1234567 → `1.23 M`; integers below 10,000 in full."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 10_000 and float(value).is_integer():
        return f"{value:,.0f}"
    for limit, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{_significant(value / limit, digits)}{unit}"
    return _significant(value, digits)


def format_percent(share: float | None) -> str:
    """0.1234 → `12.3 %`; tiny shares keep two decimals."""
    if share is None or not math.isfinite(share):
        return "–"
    value = 100 * share
    return f"{_significant(value, 3) if abs(value) >= 1 else f'{value:.2f}'} %"


def format_seconds(seconds: float | None) -> str:
    """A duration below minutes: `250 µs`, `1.4 ms`, `0.26 s`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds >= 0.1:
        return f"{_significant(seconds, 3)} s"
    return f"{_significant(seconds * 1e3, 3)} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def format_duration(seconds: float | None) -> str:
    """A duration to plan with: `45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, hours, days = round(seconds / 60), int(seconds // 3600), int(seconds // 86400)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{days} d {round(seconds % 86400 / 3600)} h"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"
