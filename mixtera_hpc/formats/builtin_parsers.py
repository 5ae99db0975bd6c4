"""Parsers for collections whose rows no dotted path describes; they are to `data.parser` what a user's own would be."""

from typing import Any

__all__ = ["red_pajama"]


def red_pajama(row: dict[str, Any]) -> dict[str, Any]:
    """`language`, the names of all, and `publication_date`: RedPajama writes a language as text, as a list, or not at all."""
    meta = row.get("meta") or {}
    language = meta.get("language")
    names = [part["name"] for part in language] if isinstance(language, list) else language
    return {"language": names, "publication_date": meta.get("publication_date")}
