"""Regular expressions over category values, restricted so that matching takes polynomial time.

A pattern is matched once against every value of a dictionary, never against samples. Repeats (`*`, `+`, `?`, `{…}`)
apply to single characters and character classes only, groups cannot be repeated, and the numbers of repeats and groups
are limited. The time to match is then polynomial in the length of a value, with these limits as the degree.
"""

import re
from collections.abc import Sequence

__all__ = ["match_values"]

MAX_REPEATS = 3
MAX_GROUPS = 3
MAX_LENGTH = 500
"""Characters of a pattern."""


def match_values(pattern: str, values: Sequence[str]) -> list[int]:
    """Return the positions of the values that `pattern` matches as a whole.

    Raises:
        ValueError: `pattern` is not a regular expression, or uses something that is not allowed. The message is for the
            user who wrote it.
    """
    if problem := _disallowed_part(pattern):
        raise ValueError(
            f"the pattern {pattern[:80]!r} {problem}.\n"
            f"  Repeat single characters or classes like [a-z], in at most {MAX_REPEATS} places; "
            "use | between whole alternatives."
        )
    # DOTALL: a value is matched as a whole, including newlines.
    try:
        whole = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a valid regular expression: {error}.") from None
    return [position for position, value in enumerate(values) if whole.fullmatch(value)]


def _disallowed_part(pattern: str) -> str | None:
    """Return what is not allowed in `pattern`, as the rest of a sentence; None if everything is allowed."""
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, {MAX_LENGTH} are allowed"

    # Replace escaped characters and classes by one plain character, so that only syntax is left to count.
    plain = re.sub(r"\\[^1-9]", "a", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", plain):
        return "refers back to a group"
    if re.search(r"\)[*+{]", plain):
        return "repeats a group"
    if plain.count("(") > MAX_GROUPS:
        return f"has {plain.count('(')} groups, {MAX_GROUPS} are allowed"

    # `(?` opens a group, and `?` after a repeat makes it lazy: neither is a repeat.
    repeats = len(re.findall(r"[*+{?]", re.sub(r"\(\?|(?<=[*+?}])\?", "", plain)))
    return f"has {repeats} repeats, {MAX_REPEATS} are allowed" if repeats > MAX_REPEATS else None
