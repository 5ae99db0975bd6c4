"""Counts, sizes and positions that damage has made wrong: every parser of binary files refuses them.

Work is counted in executed lines, and memory in allocated bytes, so a loop over a wrong count fails the test at once.
"""

import gzip
import json
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtera_hpc.errors import DataError, PropertyIndexError, UserError
from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.codecs import tar_headers
from mixtera_hpc.formats.codecs.limits import arrow_sizes
from mixtera_hpc.formats.codecs.mds_layout import check_mds_index, read_mds_layout
from mixtera_hpc.formats.codecs.seek_points import find_points, write_points
from mixtera_hpc.formats.codecs.xz_blocks import list_blocks
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import scan_whole_shard
from mixtera_hpc.testing.work_limit import limited_time, limited_work

ROWS = 10
HUGE = 1 << 60
WORDS = [f"{number * 7919 % 10007:05d}" for number in range(200_000)]


def num_rows(path: Path, name: str, spec: ScanSpec) -> int:
    """Return the number of rows that a scan finds, with little work."""
    with limited_work(lines=300_000, num_bytes=64 << 20):
        return sum(batch.rows for batch in scan_whole_shard(load_format(name), path, spec))


SPECS = {
    "documents": ScanSpec(text="text", documents=True),
    "no documents": ScanSpec(text="text"),
    "nothing": ScanSpec(text=None),
    "whole rows": ScanSpec(text="text", whole_rows=True),
}


# Parquet: the footer.


def zigzag(value: int) -> bytes:
    value = (value << 1 ^ value >> 63) & (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def replace_in_footer(path: Path, old: int, new: int, occurrence: int) -> int:
    """Replace a number of the footer where it occurs for the given time; return how often it occurs."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    parts = data[start:-8].split(zigzag(old))
    if occurrence < len(parts) - 1:
        joints = [zigzag(new if number == occurrence else old) for number in range(len(parts) - 1)]
        footer = b"".join(part + joint for part, joint in zip(parts, [*joints, b""], strict=True))
        path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return len(parts) - 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("wrong", [HUGE, -1, 0, 12344, 12346])
def test_a_wrong_number_in_a_parquet_footer_adds_and_loses_no_rows(wrong: int, spec: str, tmp_path: Path) -> None:
    """The number of rows of the file, the number of its row group, and that of values of each column."""
    path = tmp_path / "shard.parquet"
    table = pa.table({"text": ["abc"] * 12345, "number": np.arange(12345)})
    pq.write_table(table, path, write_statistics=spec != "no documents")
    whole = path.read_bytes()
    occurrences = replace_in_footer(path, 12345, wrong, 99)
    assert occurrences >= 4
    for occurrence in range(occurrences):
        path.write_bytes(whole)
        replace_in_footer(path, 12345, wrong, occurrence)
        try:
            assert num_rows(path, "parquet", SPECS[spec]) == 12345, occurrence
        except DataError as error:
            assert "shard.parquet" in str(error)


@pytest.mark.parametrize("wrong", [HUGE, -1])
def test_a_row_group_at_a_wrong_position_is_not_passed_over(wrong: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    table = pa.table({"text": [f"text {number} of many" * 50 for number in range(100)]})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False, compression=None)
    position = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    assert replace_in_footer(path, position, wrong, 0)
    with pytest.raises(DataError, match=r"shard\.parquet"):
        num_rows(path, "parquet", SPECS["documents"])


@pytest.mark.parametrize("wrong", [HUGE, -1])
def test_a_wrong_size_of_a_parquet_column_is_refused(wrong: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": [f"{number}" for number in range(1000)]}), path)
    size = pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    for occurrence in range(replace_in_footer(path, size, size, 99)):
        whole = path.read_bytes()
        replace_in_footer(path, size, wrong, occurrence)
        with limited_work(lines=300_000, num_bytes=64 << 20):
            try:
                blocks = [batch.blocks for batch in scan_whole_shard(load_format("parquet"), path, SPECS["nothing"])]
                assert all(0 <= length <= len(whole) for block in blocks for length in block.length)
            except DataError as error:
                assert "shard.parquet" in str(error)
        path.write_bytes(whole)


# Arrow.


def write_arrow(path: Path, *, stream: bool, compression: str | None = None) -> bytearray:
    table = pa.table({"text": ["abc"] * ROWS, "number": range(ROWS)})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table, max_chunksize=ROWS // 2)
    return bytearray(path.read_bytes())


def first_batch(data: bytearray) -> int:
    """Return the position of the metadata of the first record batch of a stream."""
    view = memoryview(bytes(data))
    return next(s for s, _ in arrow_sizes._stream_positions(view, 0) if arrow_sizes._kind(view, s) == 3)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("target", ["itself", "start", "8", "inside"])
def test_a_message_that_leads_back_is_refused(target: str, compression: str | None, tmp_path: Path) -> None:
    """A negative size leads to the same message, or to one before it, again and again."""
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=True, compression=compression)
    start = first_batch(data)
    view = memoryview(bytes(data))
    field = arrow_sizes._field(view, arrow_sizes._root(view, start), 3)
    metadata_bytes = struct.unpack_from("<I", data, start - 4)[0]
    back = {"itself": metadata_bytes + 8, "start": start + metadata_bytes, "8": 8, "inside": metadata_bytes}[target]
    struct.pack_into("<q", data, field, -back)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.arrow"):
        num_rows(path, "arrow", SPECS["documents"])


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("count", [0, 1, 3, 1000, (1 << 32) - 1])
def test_a_footer_that_lists_other_batches_loses_no_rows(count: int, compression: str | None, tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=False, compression=compression)
    end = len(data) - 10
    view = memoryview(bytes(data))
    footer = arrow_sizes._root(view, end - struct.unpack_from("<i", data, end)[0])
    struct.pack_into("<I", data, arrow_sizes._pointer(view, footer, 3), count)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.arrow"):
        num_rows(path, "arrow", SPECS["documents"])


@pytest.mark.parametrize("count", [3000, (1 << 32) - 1])
def test_a_batch_with_a_wrong_number_of_buffers_is_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=True, compression="zstd")
    start = first_batch(data)
    view = memoryview(bytes(data))
    header = arrow_sizes._pointer(view, arrow_sizes._root(view, start), 2)
    struct.pack_into("<I", data, arrow_sizes._pointer(view, header, 2), count)
    path.write_bytes(data)
    with limited_work(lines=3000, num_bytes=1 << 20), pytest.raises(ValueError, match="ends after the file"):
        arrow_sizes.batch_sizes(pa.memory_map(str(path)), None, pa.schema({"text": "str", "number": "i8"}))


@pytest.mark.parametrize("wrong", [HUGE, (1 << 63) - 1, -1, -(1 << 63)])
@pytest.mark.parametrize("stream", [False, True])
def test_buffers_at_wrong_positions_are_refused(stream: bool, wrong: int, tmp_path: Path) -> None:
    """Change the position, the length, and the decoded length before the content, of each buffer."""
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=stream, compression="zstd")
    view = memoryview(bytes(data))
    start, body = next(
        (s, b) for s, b in arrow_sizes._stream_positions(view, 0 if stream else 8) if arrow_sizes._kind(view, s) == 3
    )
    header = arrow_sizes._pointer(view, arrow_sizes._root(view, start), 2)
    for position in arrow_sizes._vector(view, header, 2, 16):
        offset, length = struct.unpack_from("<qq", view, position)
        for place in (position, position + 8, body + offset):
            damaged = bytearray(data)
            struct.pack_into("<q", damaged, place, wrong)
            path.write_bytes(damaged)
            try:
                assert num_rows(path, "arrow", SPECS["whole rows"]) == ROWS or not length
            except DataError as error:
                assert "shard.arrow" in str(error)


def test_a_stream_that_was_cut_off_between_two_batches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=True)
    starts = [start - 8 for start, _ in arrow_sizes._stream_positions(memoryview(bytes(data)), 0)]
    assert len(starts) == 3
    for cut in (starts[2], starts[1], len(data) - 8):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="no end mark"):
            num_rows(path, "arrow", SPECS["documents"])


@pytest.mark.parametrize("message", [0, 1, 2])
def test_an_end_mark_in_the_middle_of_a_stream_loses_no_rows(message: int, tmp_path: Path) -> None:
    """A message whose length is damaged to 0 is an end mark; so is the end of the first of two joined streams."""
    path = tmp_path / "shard.arrow"
    data = write_arrow(path, stream=True)
    start = [start for start, _ in arrow_sizes._stream_positions(memoryview(bytes(data)), 0)][message]
    joined = data + data
    struct.pack_into("<I", data, start - 4, 0)
    for content in (data, joined):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"shard\.arrow"):
            num_rows(path, "arrow", SPECS["documents"])


@pytest.mark.parametrize("name", [b"number", b"inside"])
@pytest.mark.parametrize("spec", ["documents", "nothing"])
@pytest.mark.parametrize("format_name", ["arrow", "parquet"])
def test_names_that_are_no_text_are_refused(format_name: str, spec: str, name: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"shard.{format_name}"
    table = pa.table({"text": ["abc"], "number": [{"inside": 1}]})
    if format_name == "parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(DataError, match=r"shard\."):
        num_rows(path, format_name, SPECS[spec])


# XZ, gzip and archives.


def test_zeros_behind_an_xz_file_are_passed_over_in_long_reads(tmp_path: Path) -> None:
    """A download that was only allocated ends with zeros, which the disk need not hold."""
    path = tmp_path / "shard.xz"
    content = lzma.compress(b"{}\n")
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(len(content) + (256 << 20))
        with limited_work(lines=50_000, num_bytes=4 << 20):
            assert len(list_blocks(file.fileno(), path)) == 1
        file.truncate(len(content) + 7)
        with pytest.raises(DataError, match=r"shard\.xz"):
            list_blocks(file.fileno(), path)


@pytest.mark.parametrize("padding", [0, 4, 12, 16, 20, 400])
def test_padding_of_any_length_lies_between_two_streams(padding: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.xz"
    content = lzma.compress(b"{}\n")
    path.write_bytes(content + bytes(padding) + content + bytes(padding))
    with path.open("rb") as file:
        assert [block.begin for block in list_blocks(file.fileno(), path)] == [12, len(content) + padding + 12]


@pytest.fixture(scope="module")
def seek_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """Return a gzip shard, the file of its seek points, and its content."""
    folder = tmp_path_factory.mktemp("seek")
    lines = b"".join(json.dumps({"text": " ".join(WORDS[i : i + 40])}).encode() + b"\n" for i in range(0, 200_000, 40))
    shard = folder / "shard.jsonl.gz"
    shard.write_bytes(gzip.compress(lines, mtime=0))
    points = write_points(shard, folder / "seek", 1 << 17)
    return shard, points, points.read_bytes()


@pytest.mark.parametrize("count", [0, 1, 1000, (1 << 32) - 1])
def test_a_wrong_number_of_seek_points_takes_no_memory(count: int, seek_file: tuple[Path, Path, bytes]) -> None:
    shard, points, content = seek_file
    points.write_bytes(content[:8] + struct.pack("<I", count) + content[12:])
    with limited_work(lines=10_000, num_bytes=1 << 20):
        assert find_points(shard, [points.parent]) is None


@pytest.mark.parametrize("decoded", [None, 1 << 16, 1 << 33, HUGE])
def test_a_damaged_window_names_the_file_of_the_seek_points(
    decoded: int | None, seek_file: tuple[Path, Path, bytes]
) -> None:
    """A window is a Zstandard frame that says how much it decodes to; None: there is no frame."""
    shard, points, content = seek_file
    count = struct.unpack_from("<I", content, 8)[0]
    window = 16 + 28 * count
    frame = bytes(14) if decoded is None else b"\x28\xb5\x2f\xfd\xe4" + struct.pack("<Q", decoded)
    points.write_bytes(content[:window] + frame + content[window + len(frame) :])
    seek_points = find_points(shard, [points.parent])
    assert seek_points is not None
    fails = pytest.raises(PropertyIndexError, match=points.name)
    with shard.open("rb") as file, limited_work(lines=10_000, num_bytes=4 << 20), fails:
        seek_points.read(file.fileno(), shard, 200_000, 1000)


def pax_archive(path: Path, records: bytes) -> None:
    """Write an archive whose only member has an extended header with these records."""
    header = tarfile.TarInfo("PaxHeaders/a")
    header.type = tarfile.XHDTYPE
    header.size = len(records)
    member = tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + member + bytes(1024))


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 1_000_000,
        b"1" * 5000 + b" path=b\n",
        b"1 " * 100_000,
        b"0 path=b\n",
        b"99 path=b\n",
        b"-1 a=b\n",
        b"\xff",
    ],
)
def test_damaged_lengths_in_an_extended_header_are_refused(records: bytes, tmp_path: Path) -> None:
    pax_archive(tmp_path / "shard.tar", records)
    with pytest.raises(DataError, match=r"shard\.tar is damaged: the extended header at byte 0"):
        num_rows(tmp_path / "shard.tar", "webdataset", ScanSpec(text="txt", documents=True))


def test_many_records_of_an_extended_header_take_time_in_proportion(tmp_path: Path) -> None:
    """A copy of the rest for each record is no line and no lasting memory, so copied bytes are counted."""

    class Counted(bytes):
        copied = 0

        def __getitem__(self, key: Any) -> Any:
            part = super().__getitem__(key)
            Counted.copied += len(part) if isinstance(part, bytes) else 1
            return Counted(part) if isinstance(part, bytes) else part

    records = Counted(b"5 a=\n" * 2000 + b"10 path=b\n" + bytes(7) + b"10 path=c\n" + bytes(100))
    assert tar_headers._parse_pax(records, 0) == {"a": "", "path": "c"}
    assert Counted.copied < 10 * len(records)


# JSON arrays.


@pytest.mark.parametrize("end", [b"", b"\\", b"\\\\", b'\\"'])
def test_an_array_that_ends_inside_a_text_with_quotes_is_refused_at_once(end: bytes, tmp_path: Path) -> None:
    """A download that was cut off: each quote might begin a text that goes on to the end of the file."""
    path = tmp_path / "shard.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "' + b'<a href=\\"x\\">' * 100_000 + end)
    with limited_time(30), pytest.raises(DataError, match="row 1, which begins at byte 15, does not end"):
        num_rows(path, "json", SPECS["documents"])


# MDS.


def mds_layout(header: bytes, starts: list[int] | None = None, count: int = 1) -> Callable[[], object]:
    begin = 4 * (count + 2)
    numbers = starts or [begin + len(header)] * (count + 1)
    data = struct.pack(f"<I{len(numbers)}I", count, *numbers) + header
    return lambda: read_mds_layout(lambda offset, size: data[offset : offset + size], len(data), Path("shard.mds"))


COLUMNS = b'{"format": "mds", "version": 2, "column_names": ["a"], "column_encodings": ["str"], "column_sizes": [%s]}'


@pytest.mark.parametrize(
    "read",
    [
        mds_layout(b'{"other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        mds_layout(b'{"column_names": ' + b"[" * 100_000),
        mds_layout(COLUMNS % b"-5"),
        mds_layout(COLUMNS % b"1e99"),
        mds_layout(COLUMNS % b"null", starts=[12, 11]),
        mds_layout(COLUMNS % b"null", starts=[(1 << 32) - 1] * 2),
        mds_layout(COLUMNS % b"null", starts=[0, 0]),
        mds_layout(b"", starts=[8]),
    ],
)
def test_damaged_mds_headers_are_refused(read: Callable[[], object]) -> None:
    with limited_work(lines=10_000, num_bytes=8 << 20), pytest.raises(DataError, match=r"shard\.mds"):
        read()


def test_a_deeply_nested_mds_index_is_refused(tmp_path: Path) -> None:
    layout: Any = mds_layout(COLUMNS % b"null")()
    (tmp_path / "index.json").write_bytes(
        b'{"version": 2, "shards": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    )
    with pytest.raises(UserError, match=r"index\.json"):
        check_mds_index(tmp_path / "shard.mds", layout)
