"""Bound the decoded size of a Parquet row group from its page headers, before anything is decoded.

A small file can decode to any size: pages are compressed, a column of a million rows may refer to one long entry of a
dictionary, and the sizes in the footer need not be true. A page header says how large its page is, how many values it
has and how they are encoded. Price: one read of some hundred bytes per page; a dictionary is decoded only where the
header alone cannot rule out that its entries exceed the limit. References are to the Parquet format, `parquet.thrift`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mixtera_hpc.formats.codecs.varints import read_varint

__all__ = ["ChunkSize", "chunk_size"]

HEADER_BYTES = 512
"""Bytes of a first read; a header is longer if it has statistics of long texts."""
MAX_HEADER_BYTES = 16 << 20
_DICTIONARY_PAGE = 2
# Encodings whose values may be longer than their pages.
_DICTIONARY_ENCODINGS = (2, 8)
_DELTA_BYTE_ARRAY = 7
# Physical type → bytes of a decoded value; texts have an offset each.
_VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
# Types of the compact protocol (Thrift).
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


@dataclass(slots=True)
class ChunkSize:
    """The decoded sizes of a column chunk according to its page headers, in bytes."""

    pages: int = 0
    """Size of all pages, decompressed."""
    values: int = 0
    """Size of the values of fixed length, and of the offsets of texts."""
    repeated: int = 0
    """Upper bound of texts that are stored once and occur often."""
    has_deltas: bool = False
    """Some of these texts are stored as their difference to the text before."""

    @property
    def bound(self) -> int:
        """Return an upper bound of the decoded column."""
        return self.pages + self.values + self.repeated


def chunk_size(fd: int, column: Any, value_bytes: int, limit: int) -> ChunkSize:
    """Return the sizes of a column chunk, given its metadata.

    Args:
        fd: the open file.
        column: pyarrow's metadata of the chunk.
        value_bytes: size of a value if the type has a fixed length, else 0.
        limit: a dictionary is decoded if its entries might exceed this.

    Raises:
        ValueError: a page header is damaged.
    """
    size = ChunkSize()
    value_bytes = value_bytes or _VALUE_BYTES.get(column.physical_type, 8)
    is_text = column.physical_type == "BYTE_ARRAY"
    dictionary: _Page | None = None
    num_references = 0
    for page in _pages(fd, column):
        size.pages += page.decoded_bytes
        if size.pages > limit:
            return size
        if page.is_dictionary:
            dictionary = page
            continue
        size.values += page.num_values * value_bytes
        if is_text and page.encoding in _DICTIONARY_ENCODINGS:
            num_references += page.num_values
        elif is_text and page.encoding == _DELTA_BYTE_ARRAY:
            # A value may repeat all of the page before it.
            size.repeated += page.num_values * page.decoded_bytes
            size.has_deltas = True
    if dictionary is not None and num_references:
        longest = dictionary.decoded_bytes
        if num_references * longest > limit:
            longest = _longest_entry(fd, column, dictionary)
        size.repeated += num_references * longest
    return size


@dataclass(frozen=True, slots=True)
class _Page:
    start: int
    """First byte after the header."""
    stored_bytes: int
    decoded_bytes: int
    num_values: int
    encoding: int
    is_dictionary: bool


def _pages(fd: int, column: Any) -> Iterator[_Page]:
    position = _first_byte(column)
    end = position + column.total_compressed_size
    while position < end:
        page = _read_header(fd, position)
        yield page
        position = page.start + page.stored_bytes


def _first_byte(column: Any) -> int:
    """Return the position of the first page: some writers put 0 where there is no dictionary."""
    first = int(column.data_page_offset)
    dictionary = column.dictionary_page_offset
    return min(first, int(dictionary)) if column.has_dictionary_page and dictionary else first


def _read_header(fd: int, position: int) -> _Page:
    if position < 0:
        raise ValueError(f"a page begins at byte {position}")
    size = HEADER_BYTES
    while True:
        data = os.pread(fd, size, position)
        try:
            fields, length = _read_struct(data, 0)
            break
        except IndexError:
            if len(data) < size or size >= MAX_HEADER_BYTES:
                raise ValueError(f"the page header at byte {position} is cut off") from None
            size *= 16
    of_values = fields.get(5) or fields.get(8) or {}
    if not isinstance(of_values, dict):
        raise ValueError(f"the page header at byte {position} is damaged")
    is_v2 = 8 in fields
    decoded = fields.get(2, -1)
    stored = fields.get(3, -1)
    num_values = of_values.get(1, 0)
    numbers = (decoded, stored, num_values)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"the page header at byte {position} is damaged")
    return _Page(
        start=position + length,
        stored_bytes=stored,
        decoded_bytes=decoded,
        num_values=num_values,
        encoding=of_values.get(4 if is_v2 else 2, 0),
        is_dictionary=fields.get(1) == _DICTIONARY_PAGE,
    )


def _longest_entry(fd: int, column: Any, page: _Page) -> int:
    """Return the bytes of the longest entry of a dictionary: a length of four bytes stands before each."""
    data = os.pread(fd, page.stored_bytes, page.start)
    if column.compression != "UNCOMPRESSED":
        # pyarrow has one name for two ways to frame LZ4; without a look inside, the bound is high, but not wrong.
        codec = pa.Codec("lz4_raw" if column.compression == "LZ4" else column.compression.lower())
        try:
            data = codec.decompress(data, page.decoded_bytes).to_pybytes()
        except (pa.ArrowException, OSError):
            return page.decoded_bytes
    longest = 0
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        longest = max(longest, length)
        position += 4 + length
    return min(longest, page.decoded_bytes)


def _read_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Return the numbers and structs of a struct by the number of their field, and the position after it.

    Raises:
        IndexError: the data ends inside it.
    """
    fields: dict[int, Any] = {}
    number = 0
    while head := data[position]:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = _read_signed(data, position)
        value, position = _read_value(data, position, head & 15)
        fields[number] = value
    return fields, position + 1


def _read_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    """Return a value and the position after it; texts and collections are skipped."""
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, position
    if kind == _BYTE:
        return data[position], position + 1
    if kind in (_I16, _I32, _I64):
        return _read_signed(data, position)
    if kind == _STRUCT:
        return _read_struct(data, position)
    if kind == _DOUBLE:
        return None, position + 8
    if kind == _BINARY:
        length, position = read_varint(data, position)
        # Raises where the text is not in `data` yet.
        return None, position + length if position + length < len(data) else len(data)
    if kind in (_LIST, _SET):
        return None, _skip_list(data, position)
    raise ValueError("a page header has a field of an unknown type")


def _skip_list(data: bytes, position: int) -> int:
    head = data[position]
    position += 1
    count = head >> 4
    if count == 15:
        count, position = read_varint(data, position)
    for _ in range(count):
        _, position = _read_value(data, position, head & 15)
    return position


def _read_signed(data: bytes, position: int) -> tuple[int, int]:
    """Return a zigzag-coded integer and the position after it."""
    value, position = read_varint(data, position)
    return (value >> 1) ^ -(value & 1), position
