"""Functions over documents that come with the package, for `data.properties.NAME.function`.

Cheap heuristics, each a few microseconds per document, meant for first looks at a corpus and for examples: none of them is a
classifier, and none knows languages. All depend on the text alone.
"""

import re
import unicodedata
import zlib
from collections import Counter

__all__ = ["compression_ratio", "length_bucket", "main_script", "mean_word_length", "repeated_line_share"]

_BUCKETS = ((100, "under_100"), (300, "100_to_300"), (1000, "300_to_1k"), (3000, "1k_to_3k"), (10000, "3k_to_10k"))
_SAMPLED_CHARACTERS = 400
_WORD = re.compile(r"\S+")


def length_bucket(documents: list[str]) -> list[str]:
    """Category: how many characters a document has, in steps of about three."""
    return [next((name for limit, name in _BUCKETS if len(text) < limit), "over_10k") for text in documents]


def compression_ratio(documents: list[str]) -> list[float | None]:
    """Number: bytes of the text over its bytes compressed (zlib, level 1). Around 1.5 to 3 for prose of a few kB; far above for
    boilerplate that repeats itself, at 1 for noise. Null for texts below 64 bytes, where it says nothing."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in documents]
    return [len(data) / len(zlib.compress(data, 1)) if len(data) >= 64 else None for data in encoded]


def mean_word_length(documents: list[str]) -> list[float | None]:
    """Number: characters per word, words being what stands between spaces; null without any. English prose lies at 4 to 6."""
    words = (_WORD.findall(text) for text in documents)
    return [sum(map(len, found)) / len(found) if found else None for found in words]


def repeated_line_share(documents: list[str]) -> list[float]:
    """Number: share of the lines (empty ones aside) that the document has said before; 0 for prose, near 1 for menus."""
    return [_repeated(text) for text in documents]


def main_script(documents: list[str]) -> list[str | None]:
    """Category: the script (`LATIN`, `CJK`, `CYRILLIC`, …) of most letters among 400 of the text; null without letters.

    A script is not a language: English, Turkish and Vietnamese are all `LATIN`.
    """
    return [_script(text) for text in documents]


def _repeated(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _script(text: str) -> str | None:
    step = max(len(text) // _SAMPLED_CHARACTERS, 1)
    letters = Counter(c for c in text[::step][:_SAMPLED_CHARACTERS] if c.isalpha())
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts[unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]] += count
    return min(scripts, key=lambda name: (-scripts[name], name)) if scripts else None
