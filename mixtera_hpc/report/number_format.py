"""Numbers formatted for people; `–` stands for a value that does not exist."""

import math

__all__ = [
    "format_count",
    "format_duration",
    "format_loss",
    "format_percent",
    "format_seconds",
    "format_share",
]

MISSING = "–"

SI_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float | None, digits: int = 3) -> str:
    """Format a count: 1234567 → `1.23 M`. Integers below 10,000 keep all digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 10_000 and float(value).is_integer():
        return f"{value:,.0f}"
    for limit, unit in SI_UNITS:
        if abs(value) >= limit:
            return f"{_significant(value / limit, digits)} {unit}"
    return _significant(value, digits)


def format_percent(share: float | None) -> str:
    """Format a share with three significant digits: 0.1234 → `12.3 %`. Values below 1 % have two decimals."""
    if share is None or not math.isfinite(share):
        return MISSING
    value = 100 * share
    number = _significant(value, 3) if abs(value) >= 1 else f"{value:.2f}"
    return f"{number} %"


def format_share(share: float | None) -> str:
    """Format a share with one decimal, so that the values of a column align: 0.1234 → `12.3 %`."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def format_loss(loss: float | None, decimals: int = 2) -> str:
    """Format a loss in nats per token: 2.34567 → `2.35`."""
    return MISSING if loss is None else f"{loss:.{decimals}f}"


def format_seconds(seconds: float | None) -> str:
    """Format a duration of up to some seconds: `250 µs`, `1.40 ms`, `0.260 s`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds >= 0.1:
        return f"{_significant(seconds, 3)} s"
    if seconds >= 1e-3:
        return f"{_significant(seconds * 1e3, 3)} ms"
    return f"{seconds * 1e6:.0f} µs"


def format_duration(seconds: float | None) -> str:
    """Format a long duration: `45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if seconds < 48 * 3600:
        return f"{minutes // 60} h {minutes % 60} min"
    days, remainder_s = divmod(seconds, 86400)
    return f"{days:.0f} d {round(remainder_s / 3600)} h"


def _significant(value: float, digits: int) -> str:
    """Format `value` with `digits` significant digits; all digits before the decimal point are kept."""
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"
