"""Page headers of Parquet with damaged counts, lengths and sizes: refused after little work and with little memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.codecs.limits.parquet_pages import MAX_ENTRIES, MAX_HEADER_BYTES, SPARE_PAGES, chunk_size
from mixtera_hpc.formats.codecs.limits.thrift_structs import MAX_VALUES, read_struct
from mixtera_hpc.formats.codecs.varints import encode_varint
from mixtera_hpc.formats.readers.parquet import ParquetFormat
from mixtera_hpc.testing.format_cases import scan_whole_shard
from mixtera_hpc.testing.work_limit import limited_work

HUGE = 1 << 60
BOOLEAN, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)


def items(kind: int, count: int) -> bytes:
    """Return a field that is a list of `count` items of a type, which are missing."""
    return bytes([0x10 | LIST, 0xF0 | kind]) + encode_varint(count)


def number(value: int) -> bytes:
    """Return the next field, of 32 bits."""
    return bytes([0x10 | I32]) + encode_varint(value << 1)


def page(*, decoded: int, stored: int, num_values: int = 1, more: bytes = b"") -> bytes:
    """Return the header of a plain data page of the first version; `more` are fields behind it."""
    return number(0) + number(decoded) + number(stored) + bytes([0x20 | STRUCT]) + number(num_values) + b"\0" + more


@dataclass(frozen=True, slots=True)
class Chunk:
    """The metadata of a column chunk of texts, as pyarrow has it."""

    total_compressed_size: int
    num_values: int = 10
    data_page_offset: int = 0
    dictionary_page_offset: int | None = None
    has_dictionary_page: bool = False
    physical_type: str = "BYTE_ARRAY"
    path_in_schema: str = "text"
    compression: str = "UNCOMPRESSED"


def sizes(path: Path, data: bytes, chunk: Chunk | None = None, limit: int = 1 << 30) -> int:
    """Return the bound of a file that is one column chunk."""
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with limited_work(lines=400_000, num_bytes=2 * MAX_HEADER_BYTES):
            return chunk_size(descriptor, chunk or Chunk(len(data)), 0, limit).bound
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", range(1, 16))
@pytest.mark.parametrize("count", [HUGE, (1 << 64) - 1, 1 << 20])
def test_lists_of_any_type_with_too_many_items_end_at_once(kind: int, count: int) -> None:
    for data in (items(kind, count), items(kind, count) + bytes(5000)):
        with limited_work(lines=40 * MAX_VALUES, num_bytes=1 << 20), pytest.raises((IndexError, ValueError)):
            read_struct(data, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes([0x10 | DOUBLE]) + bytes(7),
        bytes([0x10 | BINARY]) + encode_varint(10) + bytes(9),
        bytes([0x10 | BINARY]) + encode_varint(HUGE),
        bytes([0x10 | BYTE]),
        bytes([0x10 | I64, 0x80]),
        bytes([0x10 | STRUCT]),
        bytes([0x10 | LIST]),
        bytes([0x10 | LIST, 0x20 | DOUBLE]) + bytes(15),
        bytes([0x10 | LIST, 0x30 | BOOLEAN]) + bytes(2),
    ],
)
def test_a_value_that_lacks_bytes_asks_for_more(data: bytes) -> None:
    with pytest.raises(IndexError):
        read_struct(data, 0)


@pytest.mark.parametrize(
    "data",
    [
        bytes([0x10 | STRUCT]) * 5000,
        bytes([0x10 | LIST]) + bytes([0x10 | LIST]) * 5000,
        bytes([0x10 | LIST]) + bytes([0x10 | STRUCT]) * 5000,
        bytes([0x10 | BOOLEAN]) * 5000,
        number(1) * 5000,
        bytes([0x10 | LIST, 0xF0 | STRUCT]) + encode_varint(5000) + bytes(6000),
        bytes([0x10 | MAP, 1]),
        bytes([0x10 | UUID]) + bytes(17),
        bytes([0x10 | I64]) + b"\x80" * 20,
    ],
)
def test_a_struct_that_nobody_writes_is_refused(data: bytes) -> None:
    with (
        limited_work(lines=40 * MAX_VALUES, num_bytes=1 << 20),
        pytest.raises(ValueError, match=r"page header|64 bits"),
    ):
        read_struct(data, 0)


def test_all_types_are_skipped_to_the_byte_behind_them() -> None:
    """Booleans have no byte in a struct and one in a list."""
    fields = [
        bytes([0x10 | BOOLEAN]),
        bytes([0x10 | LIST, 0x30 | BOOLEAN, 1, 2, 1]),
        bytes([0x10 | DOUBLE]) + bytes(8),
        bytes([0x10 | SET, 0x20 | I32]) + encode_varint(300) * 2,
        bytes([0x10 | LIST, 0x20 | STRUCT, 0, 0]),
        bytes([0x10 | BINARY, 3]) + b"abc",
        bytes([0x10 | STRUCT]) + number(7) + b"\0",
        bytes([0x10 | FALSE]),
        bytes([0x00 | BYTE]) + encode_varint(40) + b"\x09",
    ]
    data = b"?" + b"".join(fields) + b"\0"
    expected = {1: True, 2: None, 3: None, 4: None, 5: None, 6: None, 7: {1: 7}, 8: False, 20: 9}
    assert read_struct(data + b"rest", 1) == (expected, len(data))


def test_pages_are_summed(tmp_path: Path) -> None:
    long_statistics = bytes([0x30 | BINARY]) + encode_varint(5000) + bytes(5000)
    data = page(decoded=10, stored=3, more=b"\0") + b"abc" + page(decoded=20, stored=0, more=long_statistics + b"\0")
    assert sizes(tmp_path / "shard", data) == 10 + 20 + 2 * 4


@pytest.mark.parametrize(
    ("data", "chunk"),
    [
        (page(decoded=1, stored=1, more=items(BOOLEAN, HUGE)) + bytes(MAX_HEADER_BYTES + 100), None),
        (page(decoded=1, stored=HUGE, more=b"\0"), None),
        (page(decoded=1, stored=(1 << 31) - 1, more=b"\0"), None),
        (page(decoded=HUGE, stored=1, more=b"\0") + b"a", None),
        (page(decoded=1, stored=1, num_values=HUGE, more=b"\0") + b"a", None),
        (page(decoded=0, stored=0, num_values=0, more=b"\0") * (SPARE_PAGES + 11), None),
        (b"\0" * 100, None),
        (b"\xff" * 100_000, None),
        (page(decoded=1, stored=1, more=b"\0") + b"a", Chunk(HUGE)),
        (page(decoded=1, stored=1, more=b"\0") + b"a", Chunk(100, data_page_offset=-50)),
        (page(decoded=1, stored=1, more=b"\0") + b"a", Chunk(100, data_page_offset=(1 << 63) - 10)),
        (page(decoded=1, stored=1, more=b"\0") + b"a", Chunk(100, num_values=-SPARE_PAGES)),
    ],
)
def test_damaged_pages_are_refused(data: bytes, chunk: Chunk | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="page"):
        sizes(tmp_path / "shard", data, chunk)


@pytest.mark.parametrize("compression", ["UNCOMPRESSED", "SNAPPY", "LZO", "UNKNOWN"])
@pytest.mark.parametrize("entries", [b"\xff\xff\xff\xff", b"\x05\0\0\0ab", b"\x05\0\0"])
def test_a_damaged_dictionary_counts_as_one_entry(entries: bytes, compression: str, tmp_path: Path) -> None:
    header = number(2 // 2) + number(len(entries)) + number(len(entries)) + b"\0"
    dictionary = bytes([0x10 | I32, 4]) + header[2:] + entries
    references = number(0) + number(4) + number(4) + bytes([0x20 | STRUCT]) + number(9) + number(8) + b"\0\0" + b"refs"
    data = dictionary + references
    chunk = Chunk(len(data), has_dictionary_page=True, compression=compression)
    assert sizes(tmp_path / "shard", data, chunk, limit=25) <= len(entries) + 4 + 9 * 4 + 9 * len(entries)


def test_the_entries_of_a_dictionary_are_not_looked_at_without_end(tmp_path: Path) -> None:
    """Empty entries have four bytes each, so a small file has any number of them."""
    entries = bytes(4 * (MAX_ENTRIES + 100))
    assert MAX_ENTRIES <= 1 << 20
    dictionary = bytes([0x10 | I32, 4]) + number(len(entries)) + number(len(entries)) + b"\0" + entries
    references = number(0) + number(4) + number(4) + bytes([0x20 | STRUCT]) + number(9) + number(8) + b"\0\0" + b"refs"
    data = dictionary + references
    path = tmp_path / "shard"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    chunk = Chunk(len(data), has_dictionary_page=True)
    size = chunk_size(descriptor, chunk, 0, len(entries) + 1000)
    os.close(descriptor)
    assert size.repeated == 9 * 4 * 100, "the rest may be one entry"


def test_a_damaged_header_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path, use_dictionary=False, write_statistics=False)
    data = bytearray(path.read_bytes())
    data[4:10] = items(BOOLEAN, HUGE)[:6]
    path.write_bytes(data)
    with limited_work(lines=100_000, num_bytes=1 << 26), pytest.raises(DataError, match=r"shard\.parquet: row group 0"):
        scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text", documents=True))
