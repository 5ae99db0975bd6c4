"""Long gzip members: blocks of decoded bytes, reading them from seek points, and reading them without."""

import gzip
import json
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.errors import DataError, PropertyIndexError
from mixtera_hpc.formats.base import RowBatch, ScanSpec
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import read_fully
from mixtera_hpc.formats.codecs.seek_points import SeekPoints, find_points, write_points
from mixtera_hpc.formats.readers.jsonl_gz import JsonlGzFormat
from mixtera_hpc.testing.format_cases import FormatCase, read_blocks, scan_whole_shard
from mixtera_hpc.testing.formats import CHECKS
from mixtera_hpc.testing.writers import write_compressed

pytestmark = pytest.mark.slow
"""Compresses and reads files of several megabytes."""

SMALL = JsonlGzFormat(long_bytes=1000, block_bytes=5000)
FORMAT = JsonlGzFormat(long_bytes=100_000, block_bytes=200_000)


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts for which deflate uses blocks of every type: words, noise, and runs."""
    rng = np.random.Generator(np.random.Philox(seed))
    kinds: list[Callable[[], str]] = [
        lambda: "word " * int(rng.integers(300)),
        lambda: rng.bytes(700).hex(),
        lambda: "x" * 900,
    ]
    return [f"{i} {kinds[int(rng.integers(3))]()}" for i in range(count)]


def lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def read_all(path: Path, batches: list[RowBatch], cache: BlockCache) -> list[str]:
    """Read every block, the last one first, and return all texts in order."""
    reader = FORMAT.open(path, "text", cache)
    texts_of_block = {
        block.first_row: reader.documents(block, lengths, np.arange(block.rows))
        for block, lengths in reversed(read_blocks(batches))
    }
    reader.close()
    return [text for first_row in sorted(texts_of_block) for text in texts_of_block[first_row]]


@pytest.fixture
def seek_folder(tmp_path: Path) -> Path:
    return tmp_path / "index.h5.seek"


def scan(path: Path, seek_folder: Path | None) -> list[RowBatch]:
    """Scan a shard and, with a seek folder, store its seek points."""
    spec = ScanSpec(text="text", documents=True, seek_folder=str(seek_folder) if seek_folder else None)
    return scan_whole_shard(FORMAT, path, spec)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_long_members_conform(check: Any, tmp_path: Path) -> None:
    check(FormatCase(format=SMALL, write=lambda folder, rows: write_compressed(folder, rows, "gz")), tmp_path)


@pytest.mark.parametrize("level", [1, 6, 9])
def test_blocks_are_read_from_seek_points(
    level: int, tmp_path: Path, seek_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(4000)
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(expected), level))
    batches = scan(tmp_path / "s.gz", seek_folder)
    blocks = [b for b, _ in read_blocks(batches)]
    assert len(blocks) > 3
    assert [b.offset for b in blocks] == np.cumsum([0, *(b.length for b in blocks)])[:-1].tolist()
    assert read_all(tmp_path / "s.gz", batches, BlockCache(seek_folders=[seek_folder])) == expected
    assert not caplog.records


def flushed(data: bytes, level: int, mode: int) -> bytes:
    """Return one member that is flushed every 50 kB, as `pigz` does: an empty stored block follows each flush."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31)
    parts = [compressor.compress(data[i : i + 50_000]) + compressor.flush(mode) for i in range(0, len(data), 50_000)]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("mode", [zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH])
@pytest.mark.parametrize("level", [1, 6])
def test_flushed_members_are_read_from_seek_points(level: int, mode: int, tmp_path: Path, seek_folder: Path) -> None:
    expected = texts(4000)
    (tmp_path / "s.gz").write_bytes(flushed(lines(expected), level, mode))
    batches = scan(tmp_path / "s.gz", seek_folder)
    assert read_all(tmp_path / "s.gz", batches, BlockCache(seek_folders=[seek_folder])) == expected


def test_reading_a_block_reads_only_the_bytes_near_it(
    tmp_path: Path, seek_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(texts(8000))))
    block, lengths = read_blocks(scan(tmp_path / "s.gz", seek_folder))[-2]
    reads: list[int] = []

    def read_and_count(fd: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return read_fully(fd, size, offset)

    monkeypatch.setattr("mixtera_hpc.formats.codecs.seek_points.read_fully", read_and_count)
    reader = FORMAT.open(tmp_path / "s.gz", "text", BlockCache(seek_folders=[seek_folder]))
    reader.documents(block, lengths, np.arange(3))
    assert 0 < sum(reads) < (tmp_path / "s.gz").stat().st_size / 4


def test_long_members_follow_each_other(tmp_path: Path, seek_folder: Path) -> None:
    expected = texts(3000)
    data = lines(expected)
    cuts = [0, 700_001, 1_000_003, len(data)]
    members = [gzip.compress(data[a:b]) for a, b in pairwise(cuts)]
    (tmp_path / "s.gz").write_bytes(b"".join(members) + bytes(1000))
    batches = scan(tmp_path / "s.gz", seek_folder)
    assert read_all(tmp_path / "s.gz", batches, BlockCache(seek_folders=[seek_folder])) == expected


def test_points_that_cannot_be_written_are_reported_as_an_index_error(tmp_path: Path, seek_folder: Path) -> None:
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(texts(2000))))
    seek_folder.write_text("in the way")
    with pytest.raises(
        PropertyIndexError, match=r"(?s)Cannot store the seek points of .* in .*index\.seek_points=false"
    ):
        scan(tmp_path / "s.gz", seek_folder)


def test_without_seek_points_everything_is_read_with_one_warning(
    tmp_path: Path, seek_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(2000)
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(expected)))
    batches = scan(tmp_path / "s.gz", None)
    # Readers of one shard are opened again and again.
    for _ in range(2):
        assert read_all(tmp_path / "s.gz", batches, BlockCache(seek_folders=[seek_folder])) == expected
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "decoded from the start of the file" in warning.getMessage()


def test_points_belong_to_the_content_of_a_file_and_not_to_its_path(tmp_path: Path, seek_folder: Path) -> None:
    for name, seed in (("a.gz", 1), ("b.gz", 2)):
        (tmp_path / name).write_bytes(gzip.compress(lines(texts(2000, seed))))
    write_points(tmp_path / "a.gz", seek_folder)
    (tmp_path / "a.gz").rename(tmp_path / "moved.gz")
    assert find_points(tmp_path / "moved.gz", [seek_folder]) is not None
    assert find_points(tmp_path / "b.gz", [seek_folder]) is None


def test_little_is_decoded_before_a_block(tmp_path: Path, seek_folder: Path) -> None:
    """The points next to the blocks are stored, and no others."""
    path = tmp_path / "s.gz"
    path.write_bytes(gzip.compress(lines(texts(20_000))))
    long_members = JsonlGzFormat(long_bytes=100_000, block_bytes=1 << 20)
    spec = ScanSpec(text="text", seek_folder=str(seek_folder))
    [unit] = long_members.units(path, path.stat().st_size)
    blocks = [block for block, _ in read_blocks(list(long_members.scan(path, unit, spec, 256)))]
    points = find_points(path, [seek_folder])
    assert points is not None and len(blocks) > 4
    places = np.array(points._decoded)
    before = [block.offset - int(places[places <= block.offset].max()) for block in blocks]
    assert sum(before) <= 0.15 * sum(block.length for block in blocks)
    assert len(places) <= len(blocks)


def test_damaged_points_are_ignored(tmp_path: Path, seek_folder: Path) -> None:
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(texts(2000))))
    path = write_points(tmp_path / "s.gz", seek_folder)
    data = path.read_bytes()
    for damaged in (b"", data[:10], data[:20] + bytes(9) + data[29:], b"x" + data[1:]):
        path.write_bytes(damaged)
        assert find_points(tmp_path / "s.gz", [seek_folder]) is None
        with pytest.raises((ValueError, OSError)):
            SeekPoints(path)


def test_a_truncated_shard_is_refused_when_read(tmp_path: Path, seek_folder: Path) -> None:
    path = tmp_path / "s.gz"
    path.write_bytes(gzip.compress(lines(texts(4000))))
    batches = scan(path, seek_folder)
    points = find_points(path, [seek_folder])
    assert points is not None
    path.write_bytes(path.read_bytes()[:-50_000])
    block, _ = read_blocks(batches)[-1]
    with path.open("rb") as file, pytest.raises(DataError, match="cannot be decompressed"):
        points.read(file.fileno(), path, block.offset, block.length)


def test_a_short_member_stays_one_block(tmp_path: Path, seek_folder: Path) -> None:
    (tmp_path / "s.gz").write_bytes(gzip.compress(lines(texts(20))))
    (block,) = [b for b, _ in read_blocks(scan(tmp_path / "s.gz", seek_folder))]
    assert (block.offset, block.length, block.rows) == (0, (tmp_path / "s.gz").stat().st_size, 20)
    assert not seek_folder.exists()
