"""Functions over documents that come with the package, for `data.properties.NAME.function`.

They are cheap heuristics, a few microseconds per document, for examples and for a first look at a corpus. None of them
is a classifier, and none detects languages. Each depends on the text alone.
"""

import re
import unicodedata
import zlib
from collections import Counter

__all__ = ["compression_ratio", "length_bucket", "main_script", "mean_word_length", "repeated_line_share"]

_BUCKETS = ((100, "under_100"), (300, "100_to_300"), (1000, "300_to_1k"), (3000, "1k_to_3k"), (10000, "3k_to_10k"))
_MIN_COMPRESSED_BYTES = 64
"""Shorter texts have no meaningful compression ratio: zlib's header dominates."""
_SAMPLED_CHARACTERS = 400
# Compiled once: the functions are called for a few thousand documents at a time.
_WORD = re.compile(r"\S+")


def length_bucket(documents: list[str]) -> list[str]:
    """Return a category: the number of characters, in steps of about a factor of three."""
    return [next((name for limit, name in _BUCKETS if len(text) < limit), "over_10k") for text in documents]


def compression_ratio(documents: list[str]) -> list[float | None]:
    """Return a number: bytes of the text divided by its compressed bytes (zlib, level 1).

    It is about 1.5 to 3 for a few kB of prose, far higher for repeated boilerplate, and 1 for noise. Null below 64
    bytes.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in documents]
    return [_ratio(data) if len(data) >= _MIN_COMPRESSED_BYTES else None for data in encoded]


def mean_word_length(documents: list[str]) -> list[float | None]:
    """Return a number: characters per word, words being separated by white space. English prose has 4 to 6.

    Null without words.
    """
    words_of_text = (_WORD.findall(text) for text in documents)
    return [sum(map(len, words)) / len(words) if words else None for words in words_of_text]


def repeated_line_share(documents: list[str]) -> list[float]:
    """Return a number: the share of non-empty lines that repeat an earlier line; 0 for prose, near 1 for menus."""
    return [_repeated(text) for text in documents]


def main_script(documents: list[str]) -> list[str | None]:
    """Return a category: the script (`LATIN`, `CJK`, `CYRILLIC`, …) of most letters among 400 characters of the text.

    A script is not a language: English, Turkish and Vietnamese are all `LATIN`. Null without letters.
    """
    return [_script(text) for text in documents]


def _ratio(data: bytes) -> float:
    return len(data) / len(zlib.compress(data, 1))


def _repeated(text: str) -> float:
    # Indentation and trailing blanks do not make a line different.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _script(text: str) -> str | None:
    # Characters at equal distances over the whole text: a foreign title does not decide.
    step = max(len(text) // _SAMPLED_CHARACTERS, 1)
    letters = Counter(c for c in text[::step][:_SAMPLED_CHARACTERS] if c.isalpha())
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        # Unicode names begin with the script: "CYRILLIC SMALL LETTER A", "CJK UNIFIED IDEOGRAPH-4E00".
        scripts[unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]] += count
    return min(scripts, key=lambda name: (-scripts[name], name)) if scripts else None
