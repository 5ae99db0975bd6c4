"""Files of `xz -T`, which have many blocks in one stream: each block is decoded alone."""

import json
import lzma
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.varints import read_varint
from mixtera_hpc.formats.codecs.xz_blocks import list_blocks
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import read_blocks, scan_whole_shard

XZ = shutil.which("xz")


def compressed(path: Path, lines: list[str], *flags: str) -> Path:
    """Compress with the real program."""
    if XZ is None:
        pytest.skip("xz is not installed")
    data = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    path.write_bytes(subprocess.run([XZ, "-c", *flags], input=data, capture_output=True, check=True).stdout)
    return path


TEXTS = [f"{i} {'word ' * (i % 40)}" for i in range(3000)]


@pytest.mark.parametrize("check", ["crc32", "crc64", "sha256", "none"])
@pytest.mark.parametrize("threads", ["-T1", "-T2"])
def test_blocks_in_the_middle_of_lines_are_joined(check: str, threads: str, tmp_path: Path) -> None:
    path = compressed(tmp_path / "s.xz", TEXTS, "--block-size=20000", f"--check={check}", threads)
    with path.open("rb") as file:
        blocks = list_blocks(file.fileno(), path)
    assert len(blocks) > 10 and sum(b.decoded_bytes for b in blocks) == len(lzma.decompress(path.read_bytes()))
    batches = scan_whole_shard(load_format("jsonl.xz"), path, ScanSpec(text="text", documents=True))
    assert [d for b in batches for d in b.documents or []] == TEXTS


def test_a_block_that_ends_a_line_is_read_alone(tmp_path: Path) -> None:
    """The file has two streams of two blocks each, with padding behind them."""
    half = compressed(tmp_path / "a.xz", ["x" * 87] * 99, "--block-size=5100").read_bytes()
    path = tmp_path / "s.xz"
    path.write_bytes(half + bytes(8) + half + bytes(4))
    batches = scan_whole_shard(load_format("jsonl.xz"), path, ScanSpec(text="text", documents=True))
    blocks = read_blocks(batches)
    assert len(blocks) >= 4, "51 lines end a block of 5100 bytes"
    reader = load_format("jsonl.xz").open(path, "text", BlockCache())
    for block, lengths in reversed(blocks):
        assert reader.documents(block, lengths, np.arange(block.rows)) == ["x" * 87] * block.rows
    reader.close()


@pytest.mark.parametrize("position", [5, 30, 3000, -30, -8, -1])
def test_a_flipped_byte_is_refused_with_its_place(position: int, tmp_path: Path) -> None:
    path = compressed(tmp_path / "s.xz", TEXTS, "--block-size=20000")
    data = bytearray(path.read_bytes())
    data[position] ^= 0x41
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"s\.xz cannot be decompressed: .*near byte"):
        scan_whole_shard(load_format("jsonl.xz"), path, ScanSpec(text="text"))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = compressed(tmp_path / "s.xz", TEXTS[:200], "--block-size=2000")
    data = path.read_bytes()
    for size in range(1, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(DataError):
            scan_whole_shard(load_format("jsonl.xz"), path, ScanSpec(text="text"))


def test_numbers_of_variable_length_have_at_most_64_bits() -> None:
    assert read_varint(b"\0\xac\x02", 1) == (300, 3)
    assert read_varint(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)
    with pytest.raises(ValueError, match="more than 64 bits"):
        read_varint(b"\xff" * 11, 0)
    with pytest.raises(IndexError):
        read_varint(b"\xff", 0)
