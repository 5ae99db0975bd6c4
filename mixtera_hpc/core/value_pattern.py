"""Regular expressions over category values, of a kind that cannot run away.

A pattern meets every value of a dictionary once, never a sample. Repeats (`*`, `+`, `?`, `{…}`) apply to single characters and
classes, groups are not repeated, and there are few of either: then the time is polynomial in the length of a value, of a degree
as low as these numbers.
"""

import re
from collections.abc import Sequence

__all__ = ["match_values"]

MAX_REPEATS, MAX_GROUPS, MAX_LENGTH = 3, 3, 500


def match_values(pattern: str, values: Sequence[str]) -> list[int]:
    """Positions of the values that `pattern` matches as a whole.

    Raises:
        ValueError: it is no regular expression, or not of the kind that is allowed; the message is for users, who wrote it.
    """
    if problem := _problem(pattern):
        raise ValueError(
            f"the pattern {pattern[:80]!r} {problem}.\n"
            f"  Repeat single characters or classes like [a-z], in at most {MAX_REPEATS} places; use | between whole alternatives."
        )
    try:
        whole = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}.") from None
    return [position for position, value in enumerate(values) if whole.fullmatch(value)]


def _problem(pattern: str) -> str | None:
    """What is not allowed in a pattern."""
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, {MAX_LENGTH} are allowed"
    plain = re.sub(r"\\[^1-9]", "a", pattern)  # Escaped characters mean themselves, or a class.
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", plain):
        return "refers back to a group"
    if re.search(r"\)[*+{]", plain):
        return "repeats a group"
    if plain.count("(") > MAX_GROUPS:
        return f"has {plain.count('(')} groups, {MAX_GROUPS} are allowed"
    repeats = len(re.findall(r"[*+{?]", re.sub(r"\(\?|(?<=[*+?}])\?", "", plain)))
    return f"has {repeats} repeats, {MAX_REPEATS} are allowed" if repeats > MAX_REPEATS else None
