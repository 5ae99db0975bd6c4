"""Decode the bytes of JSON rows, some rows per call: a call per row costs as much as a fifth of the decoding."""

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.batching.json_payloads import decode_payloads
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.batching.row_type import RowType

__all__ = ["JsonRowDecoder"]

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
        rows = self._stripped(rows)
        values = _decode_list(_PAYLOADS, rows)
        try:
            return decode_payloads(rows) if values is None else values
        except JSON_ERRORS as error:
            raise ValueError(f"{error}") from None

    def documents(self, rows: Sequence[Row]) -> list[str]:
        """Return the texts of the rows; see `RowDecoder`."""
        rows = self._stripped(rows)
        values = _decode_list(self._list_decoder, rows)
        try:
            return self._type.documents(list(map(self._decoder.decode, rows)) if values is None else values)
        except JSON_ERRORS as error:
            raise ValueError(f"{error}") from None

    def _stripped(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [bytes(row).rstrip(self._after_row) for row in rows] if self._after_row else rows


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
