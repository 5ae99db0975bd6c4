"""Compressed JSON lines: block boundaries, and errors for damaged files."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import RowBatch, ScanSpec
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import read_blocks, scan_whole_shard

SPEC = ScanSpec(text="text", documents=True)
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"table"


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def scan(path: Path, name: str) -> list[RowBatch]:
    return scan_whole_shard(load_format(name), path, SPEC)


def blocks_of(path: Path, name: str) -> list[tuple[int, int, int]]:
    """Return (offset, length, rows) of every block, after checking that each reads back what was scanned."""
    batches = scan(path, name)
    texts = [d for b in batches for d in b.documents or []]
    reader = load_format(name).open(path, "text", BlockCache())
    blocks = read_blocks(batches)
    read = [t for block, lengths in blocks for t in reader.documents(block, lengths, np.arange(block.rows))]
    reader.close()
    assert read == texts
    return [(block.offset, block.length, block.rows) for block, _ in blocks]


def test_a_block_ends_with_every_frame_that_ends_a_line(tmp_path: Path) -> None:
    frames = [
        zstandard.compress(lines("a", "b")),
        zstandard.compress(lines("c")),
        zstandard.compress(lines("d", "e", "f")),
    ]
    (tmp_path / "s").write_bytes(b"".join(frames))
    a, b, c = map(len, frames)
    assert blocks_of(tmp_path / "s", "jsonl.zst") == [(0, a, 2), (a, b, 1), (a + b, c, 3)]


def test_frames_that_share_a_line_are_one_block(tmp_path: Path) -> None:
    data = lines("a", "b", "c", "d")
    frames = [
        zstandard.compress(data[:20]),
        zstandard.compress(data[20 : len(lines("a", "b"))]),
        zstandard.compress(lines("c", "d")),
    ]
    (tmp_path / "s").write_bytes(b"".join(frames))
    a, b, c = map(len, frames)
    assert blocks_of(tmp_path / "s", "jsonl.zst") == [(0, a + b, 2), (a + b, c, 2)]


def test_a_single_frame_is_a_single_block_of_any_length(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    texts = [rng.bytes(500).hex() for _ in range(5000)]
    (tmp_path / "s").write_bytes(zstandard.compress(lines(*texts)))
    batches = scan(tmp_path / "s", "jsonl.zst")
    assert len(batches) > 1, "a long block comes in several batches"
    assert blocks_of(tmp_path / "s", "jsonl.zst") == [(0, (tmp_path / "s").stat().st_size, 5000)]


def test_frames_without_rows_belong_to_the_next_block(tmp_path: Path) -> None:
    frames = [
        SKIPPABLE,
        zstandard.compress(lines("a")),
        zstandard.compress(b""),
        zstandard.compress(b"\n \n"),
        SKIPPABLE,
    ]
    frames += [zstandard.compress(lines("b")), SKIPPABLE]
    (tmp_path / "s").write_bytes(b"".join(frames))
    sizes = list(map(len, frames))
    first = sum(sizes[:2])
    second = sum(sizes[2:6])
    assert blocks_of(tmp_path / "s", "jsonl.zst") == [(0, first, 1), (first, second, 1)]


@pytest.mark.parametrize("name", ["jsonl.zst", "jsonl.gz"])
def test_the_last_line_needs_no_newline(name: str, tmp_path: Path) -> None:
    compress = zstandard.compress if name == "jsonl.zst" else gzip.compress
    (tmp_path / "s").write_bytes(compress(lines("a", "b").rstrip()))
    assert [rows for _, _, rows in blocks_of(tmp_path / "s", name)] == [2]


def test_gzip_members_are_blocks_and_padding_is_skipped(tmp_path: Path) -> None:
    members = [gzip.compress(lines("a")), gzip.compress(lines("b", "c"))]
    padding = b"\0" * 600_000
    (tmp_path / "s").write_bytes(members[0] + padding + members[1] + padding)
    a, b = map(len, members)
    assert blocks_of(tmp_path / "s", "jsonl.gz") == [(0, a, 1), (a, len(padding) + b, 2)]


@pytest.mark.parametrize("name", ["jsonl.zst", "jsonl.gz"])
def test_a_file_without_rows_has_no_blocks(name: str, tmp_path: Path) -> None:
    compress = zstandard.compress if name == "jsonl.zst" else gzip.compress
    for content in (b"", compress(b""), compress(b"\n\n")):
        (tmp_path / "s").write_bytes(content)
        assert blocks_of(tmp_path / "s", name) == []


@pytest.mark.parametrize("name", ["jsonl.zst", "jsonl.gz"])
def test_damage_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    compress = zstandard.compress if name == "jsonl.zst" else gzip.compress
    whole = compress(lines(*[f"{i}" * i for i in range(99)]))
    (tmp_path / "s").write_bytes(whole[:-5])
    with pytest.raises(DataError, match="ends inside a compressed frame"):
        scan(tmp_path / "s", name)
    for content in (b"not compressed at all", whole + b"trailing bytes"):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(DataError, match=r"s cannot be decompressed: .*near byte"):
            scan(tmp_path / "s", name)


def test_bad_rows_are_numbered_across_segments(tmp_path: Path) -> None:
    good = lines(*["x" * 1000] * 5000)
    (tmp_path / "s").write_bytes(zstandard.compress(good) + zstandard.compress(b"oops\n" + lines("y")))
    with pytest.raises(DataError) as caught:
        scan(tmp_path / "s", "jsonl.zst")
    assert "row=5000: " in caught.value.__notes__[0]


def test_a_shard_that_changed_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(zstandard.compress(lines("a", "b")))
    ((block, lengths),) = read_blocks(scan(path, "jsonl.zst"))
    path.write_bytes(zstandard.compress(lines("a", "b", "c")))
    reader = load_format("jsonl.zst").open(path, "text", BlockCache())
    with pytest.raises(DataError, match=r"index verify|cannot be decompressed"):
        reader.documents(block, lengths, np.array([0]))
    path.write_bytes(zstandard.compress(lines("ab")))
    with pytest.raises(DataError, match="2 rows were expected, but it has 1"):
        reader.documents(block, lengths, np.array([0]))
    reader.close()
