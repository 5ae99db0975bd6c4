"""Parsers of public collections whose rows need more than dotted paths. They are used like a user's `data.parser`."""

from typing import Any

__all__ = ["red_pajama"]


def red_pajama(row: dict[str, Any]) -> dict[str, Any]:
    """Return `language` and `publication_date` of a RedPajama row.

    RedPajama writes the language as a text, as a list of objects with a name, or not at all.
    """
    meta = row.get("meta") or {}
    language = meta.get("language")
    if isinstance(language, list):
        language = [entry["name"] for entry in language]
    return {"language": language, "publication_date": meta.get("publication_date")}
