"""Decode whole rows of JSON, as a trainer or a parser gets them."""

from typing import Any

import msgspec

__all__ = ["decode_payload"]

_DECODER: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()
# Calls Python for every number, so it is used for rows that need it only.
_LARGE_NUMBERS: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder(float_hook=float)


def decode_payload(row: bytes | memoryview) -> Any:
    """Decode a row. A number beyond the range of a float is infinite, as in Python's `json`."""
    try:
        return _DECODER.decode(row)
    except msgspec.ValidationError:
        return _LARGE_NUMBERS.decode(row)
