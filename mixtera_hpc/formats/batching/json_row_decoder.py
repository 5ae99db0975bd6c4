"""Decode the bytes of JSON rows, some rows per call: a call per row costs as much as a fifth of the decoding.

A call holds the interpreter's lock, so it gets at most `JOINED_BYTES`, about 0.25 ms, unless a single row has more.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.batching.json_payloads import decode_payloads
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.batching.row_type import RowType

__all__ = ["JsonRowDecoder"]

JOINED_BYTES = 1 << 18
"""Most bytes of rows that are decoded in one call."""

Row = bytes | memoryview
_PAYLOADS: "msgspec.json.Decoder[list[Any]]" = msgspec.json.Decoder(list[Any])


# The type depends on the text only. Making it takes ten times as long as opening a shard.
@functools.lru_cache(maxsize=64)
def _typed_decoders(text: str | None) -> tuple[RowType, "msgspec.json.Decoder[Any]", "msgspec.json.Decoder[Any]"]:
    """Return the type of a row, and the decoders of one row and of a list of rows."""
    row_type = RowType(ScanSpec(text=text))
    return row_type, msgspec.json.Decoder(row_type.struct), msgspec.json.Decoder(list[row_type.struct])  # type: ignore[name-defined]


class JsonRowDecoder:
    """A `RowDecoder` of JSON."""

    def __init__(self, text: str | None, after_row: bytes = b"") -> None:
        """Decode rows with documents at the path `text`; the bytes `after_row` are stripped from the end of rows."""
        self._after_row = after_row
        self._type, self._decoder, self._list_decoder = _typed_decoders(text)

    def payloads(self, rows: Sequence[Row]) -> list[Any]:
        """Return the rows as dicts; see `RowDecoder`."""
        if sum(map(len, rows)) > JOINED_BYTES and len(rows) > 1:
            return [payload for group in _groups(rows) for payload in self.payloads(group)]
        rows = self._stripped(rows)
        values = _decode_list(_PAYLOADS, rows)
        try:
            return decode_payloads(rows) if values is None else values
        except JSON_ERRORS as error:
            raise ValueError(f"{error}") from None

    def documents(self, rows: Sequence[Row]) -> list[str]:
        """Return the texts of the rows; see `RowDecoder`."""
        if sum(map(len, rows)) > JOINED_BYTES and len(rows) > 1:
            return [document for group in _groups(rows) for document in self.documents(group)]
        rows = self._stripped(rows)
        values = _decode_list(self._list_decoder, rows)
        try:
            return self._type.documents([self._decoder.decode(row) for row in rows] if values is None else values)
        except JSON_ERRORS as error:
            raise ValueError(f"{error}") from None

    def _stripped(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [bytes(row).rstrip(self._after_row) for row in rows] if self._after_row else rows


def _groups(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield consecutive rows of at most `JOINED_BYTES` together; a longer row is alone."""
    begin = 0
    num_bytes = 0
    for number, size in enumerate(map(len, rows)):
        if num_bytes + size > JOINED_BYTES and number > begin:
            yield rows[begin:number]
            begin = number
            num_bytes = 0
        num_bytes += size
    yield rows[begin:]


def _decode_list(decoder: "msgspec.json.Decoder[Any]", rows: Sequence[Row]) -> list[Any] | None:
    """Decode rows as the elements of one list; None if they have to be decoded one by one."""
    if len(rows) < 2:
        return None
    # Brackets at the first and the last row cost less than a copy of all of them.
    elements = [b"".join((b"[", rows[0])), *rows[1:-1], b"".join((rows[-1], b"]"))]
    try:
        values: list[Any] = decoder.decode(b",".join(elements))
    except JSON_ERRORS:
        return None
    # Each row adds at least one element, or the list is no JSON.
    return values if len(values) == len(rows) else None
