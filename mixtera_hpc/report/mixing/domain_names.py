"""Domain names in tables and plots, without the properties that all names share."""

import re
from collections.abc import Sequence

__all__ = ["common_property", "shorten_names"]

SEPARATOR = " · "
"""Text between the values of a domain with several properties."""

PROPERTY_START = re.compile(r" (?=[\w.-]+=)")
"""The space before a further property of a domain name. A value may have spaces too."""


def common_property(names: Sequence[str]) -> str | None:
    """Return the property that all domain names begin with, or all their properties, such as `source · language`.

    None if the names have different properties.
    """
    properties = {tuple(name for name, _ in _pairs(domain)) for domain in names}
    common = properties.pop() if len(properties) == 1 else ()
    return SEPARATOR.join(common) or None


def shorten_names(names: Sequence[str]) -> list[str]:
    """Remove the common properties from domain names.

    `source=C4`, `source=Book` → `C4`, `Book`; `source=C4 language=de` → `C4 · de`.
    """
    if common_property(names) is None:
        return list(names)
    return [SEPARATOR.join(value for _, value in _pairs(name)) for name in names]


def _pairs(name: str) -> list[tuple[str, str]]:
    """Return the properties and values of a domain name; none for a name of another form, such as `all`."""
    pairs = [part.partition("=") for part in PROPERTY_START.split(name)]
    if not all(equals for _, equals, _ in pairs):
        return []
    return [(prop, value) for prop, _, value in pairs]
