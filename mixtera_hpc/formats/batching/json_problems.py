"""Say why a row of JSON cannot be decoded, where the words of the decoder mislead."""

import codecs
import re

import msgspec

__all__ = ["JSON_ERRORS", "json_problem", "without_bom"]

JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""The errors that the decoder raises on a row that it cannot decode."""
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BYTE = re.compile(r"\(byte (\d+)\)")
# One escape of a JSON string. Pairs of backslashes are consumed, so that `\\ud83d` is not taken for an escape.
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_CONSTANT = re.compile(rb"-?(?:NaN|Infinity)")


def without_bom(data: bytes) -> bytes:
    """Return the content of a file without the byte order mark of UTF-8 at its start."""
    return data.removeprefix(codecs.BOM_UTF8)


def json_problem(row: bytes, error: Exception) -> str:
    """Return the reason why `row` cannot be decoded.

    Args:
        row: the bytes of the row.
        error: what the decoder raised, one of `JSON_ERRORS`.
    """
    if row.startswith(_BYTE_ORDER_MARKS):
        return f"{error}; it begins with a byte order mark: write the file as UTF-8 without one"
    # A value of the wrong type is well-formed: the decoder names it best.
    if isinstance(error, msgspec.ValidationError) or not isinstance(error, msgspec.DecodeError):
        return str(error)
    surrogate = _lone_surrogate(row)
    if surrogate is not None:
        position, code = surrogate
        return f"a lone surrogate \\u{code}, half of a character (byte {position})"
    place = _BYTE.search(str(error))
    if place and (constant := _CONSTANT.match(row, int(place[1]))):
        return f"{error}: {constant[0].decode()} is not JSON, although Python writes it"
    return str(error)


def _lone_surrogate(row: bytes) -> tuple[int, str] | None:
    """Return the position and the code of the first escaped surrogate without its other half."""
    # A high surrogate that still waits for the low one right behind it.
    high: re.Match[bytes] | None = None
    for match in _ESCAPE.finditer(row):
        kind = match[1][:2].lower() if match[1] else b""
        is_low = kind in (b"dc", b"dd", b"de", b"df")
        if high is not None and not (is_low and match.start() == high.end()):
            return high.start(), high[1].decode()
        if is_low and high is None:
            return match.start(), match[1].decode()
        high = match if kind in (b"d8", b"d9", b"da", b"db") else None
    return (high.start(), high[1].decode()) if high is not None else None
