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

from mixtera_hpc.formats.codecs.limits.thrift_structs import read_struct
from mixtera_hpc.formats.codecs.positioned_reads import read_fully

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
MAX_NUMBER = (1 << 31) - 1
"""Largest number in a page header: all of them are 32-bit."""
SPARE_PAGES = 1000
"""Pages that a chunk may have beyond one for each of its values. Some writers leave empty pages."""
MAX_ENTRIES = 1 << 20
"""Entries of a dictionary that are looked at; their number would otherwise set the time."""


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
    file_bytes = os.fstat(fd).st_size
    position = _first_byte(column)
    end = position + column.total_compressed_size
    pages_left = column.num_values + SPARE_PAGES
    while position < end:
        if not 0 <= position < file_bytes:
            raise ValueError(f"a page begins at byte {position}")
        page = _read_header(fd, position)
        if page.start + page.stored_bytes > file_bytes:
            raise ValueError(f"the page at byte {position} ends after the file")
        if pages_left <= 0:
            raise ValueError(f"the column {column.path_in_schema} has more pages than its {column.num_values} values")
        yield page
        position = page.start + page.stored_bytes
        pages_left -= 1


def _first_byte(column: Any) -> int:
    """Return the position of the first page: some writers put 0 where there is no dictionary."""
    first = int(column.data_page_offset)
    dictionary = column.dictionary_page_offset
    return min(first, int(dictionary)) if column.has_dictionary_page and dictionary else first


def _read_header(fd: int, position: int) -> _Page:
    size = HEADER_BYTES
    while True:
        data = read_fully(fd, size, position)
        try:
            fields, length = read_struct(data, 0)
            break
        except IndexError:
            if len(data) < size or size >= MAX_HEADER_BYTES:
                raise ValueError(f"the page header at byte {position} is cut off") from None
            size = min(16 * size, MAX_HEADER_BYTES)
    of_values = fields.get(5) or fields.get(8) or {}
    if not isinstance(of_values, dict):
        raise ValueError(f"the page header at byte {position} is damaged")
    is_v2 = 8 in fields
    decoded = fields.get(2, -1)
    stored = fields.get(3, -1)
    num_values = of_values.get(1, 0)
    numbers = (decoded, stored, num_values)
    if not all(isinstance(number, int) and 0 <= number <= MAX_NUMBER for number in numbers):
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
    """Return the bytes of the longest entry of a dictionary, or more if it has very many.

    A length of four bytes stands before each entry.
    """
    data = read_fully(fd, page.stored_bytes, page.start)
    if column.compression != "UNCOMPRESSED":
        # pyarrow has one name for two ways to frame LZ4; without a look inside, the bound is high, but not wrong.
        name = "lz4_raw" if column.compression == "LZ4" else column.compression.lower()
        try:
            data = pa.Codec(name).decompress(data, page.decoded_bytes).to_pybytes()
        except (pa.ArrowException, OSError, ValueError):
            return page.decoded_bytes
    longest = 0
    position = 0
    for _ in range(MAX_ENTRIES):
        if position >= len(data):
            break
        length = int.from_bytes(data[position : position + 4], "little")
        longest = max(longest, length)
        position += 4 + length
    # An entry behind those has at most all bytes that are left.
    longest = max(longest, len(data) - position)
    return min(longest, page.decoded_bytes)
