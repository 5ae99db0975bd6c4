"""Decode whole rows of JSON, as a trainer or a parser gets them.

Another thread can get the interpreter's lock after each row: rows are decoded in a loop of Python, because `map` and
`list` would hold the lock for all of them.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

__all__ = ["decode_payload", "decode_payloads"]

_DECODER: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()
# Calls Python for every number, so it is used for rows that need it only.
_LARGE_NUMBERS: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder(float_hook=float)


def decode_payload(row: bytes | memoryview) -> Any:
    """Decode a row. A number beyond the range of a float is infinite, as in Python's `json`."""
    try:
        return _DECODER.decode(row)
    except msgspec.ValidationError:
        return _LARGE_NUMBERS.decode(row)


def decode_payloads(rows: Sequence[bytes | memoryview]) -> list[Any]:
    """Decode several rows; see `decode_payload`."""
    try:
        return [_DECODER.decode(row) for row in rows]
    except msgspec.ValidationError:
        return list(map(decode_payload, rows))
