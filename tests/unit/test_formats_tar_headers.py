"""Headers of tar archives, compared with Python's `tarfile`, and the grouping of members into samples."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.tar_headers import TarError, iter_members
from mixtera_hpc.formats.readers.webdataset import WebDatasetFormat
from mixtera_hpc.testing.format_cases import read_blocks, scan_whole_shard

NAMES = [
    "short.txt",
    "d/" * 60 + "deep.txt",
    "x" * 180 + ".txt",
    "ü🙂/ж.txt",
    "a b.txt",
    "p/" * 120 + "y" * 120 + ".txt",
]


def archive(path: Path, form: int, names: list[str], **changes: Any) -> list[tuple[str, int, int]]:
    """Write an archive with links between the files; return each file's (name, position, size) by `tarfile`."""
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            if number % 2:
                link = tarfile.TarInfo(f"link{number}")
                link.type = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 4 // 2]
                link.linkname = "z" * (90 if form == tarfile.USTAR_FORMAT else 150)
                tar.addfile(link)
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"c" * info.size))
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]


def read_members(path: Path) -> list[tuple[str, int, int]]:
    data = path.read_bytes()
    members = iter_members(lambda offset, size: data[offset : offset + size], 0, len(data), to_end=True)
    return [(member.name, member.data, member.size) for member in members]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(form: int, tmp_path: Path) -> None:
    names = [n for n in NAMES if form != tarfile.USTAR_FORMAT or (len(n.encode()) < 100 or n.startswith("d/"))]
    assert archive(tmp_path / "t.tar", form, names) == read_members(tmp_path / "t.tar")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_numbers_too_large_for_octal_are_read(form: int, tmp_path: Path) -> None:
    expected = archive(tmp_path / "t.tar", form, NAMES[:3], uid=2**31, mtime=-1)
    assert expected == read_members(tmp_path / "t.tar")


def test_a_size_in_base_256_is_read() -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)
    (member,) = iter_members(
        lambda offset, size: (header if offset == 0 else bytes(size))[:size], 0, 1024 + (9 << 33), to_end=True
    )
    assert (member.name, member.size, member.end) == ("big.bin", 9 << 33, 512 + (9 << 33))


def test_a_damaged_extended_header_is_refused() -> None:
    info = tarfile.TarInfo("ü" * 200)
    header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    header[512:515] = b"999"
    with pytest.raises(TarError, match="extended header at byte 0 is damaged"):
        list(iter_members(lambda offset, size: bytes(header)[offset : offset + size], 0, len(header), to_end=False))


@pytest.mark.parametrize("size", ["abc", "-1024", ""])
def test_an_invalid_size_in_an_extended_header_is_refused(size: str, tmp_path: Path) -> None:
    archive(tmp_path / "t.tar", tarfile.PAX_FORMAT, ["a.txt"], pax_headers={"size": size})
    with pytest.raises(TarError, match="extended header at byte 0 is damaged: size="):
        read_members(tmp_path / "t.tar")


def test_a_negative_size_is_refused() -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"-0000002000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(TarError, match="no valid header at byte 0"):
        list(iter_members(lambda offset, size: bytes(header)[offset : offset + size], 0, 512, to_end=False))


def test_joined_archives_are_read_to_the_end(tmp_path: Path) -> None:
    for name, names in (("a.tar", ["a.txt", "b.txt"]), ("b.tar", ["c.txt"])):
        archive(tmp_path / name, tarfile.PAX_FORMAT, names)
    joined = tmp_path / "t.tar"
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert [row["__key__"] for row in rows_of(joined)] == ["a", "b", "c"]
    joined.write_bytes(joined.read_bytes()[: 20 * 512 + 512])
    with pytest.raises(TarError, match="without an end mark"):
        read_members(joined)


def rows_of_archive(tmp_path: Path, names: list[str]) -> list[dict[str, Any]]:
    archive(tmp_path / "t.tar", tarfile.PAX_FORMAT, names)
    return rows_of(tmp_path / "t.tar")


def rows_of(path: Path) -> list[dict[str, Any]]:
    blocks = read_blocks(scan_whole_shard(WebDatasetFormat(), path, ScanSpec(text=None, whole_rows=True)))
    reader = WebDatasetFormat().open(path, None, BlockCache())
    rows = [row for block, lengths in blocks for row in reader.payloads(block, lengths, np.arange(block.rows))]
    reader.close()
    return rows


def test_consecutive_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    names = ["a.jpg", "a.seg.png", "b.jpg", "dir.v1/a.JPG", "dir.v1/a.cls", "./c.bin", "d.txt"]
    rows = rows_of_archive(tmp_path, names)
    assert [(row["__key__"], sorted(row)[1:]) for row in rows] == [
        ("a", ["jpg", "seg.png"]),
        ("b", ["jpg"]),
        ("dir.v1/a", ["cls", "jpg"]),
        ("c", ["bin"]),
        ("d", ["txt"]),
    ]


def test_a_key_that_comes_back_is_refused_with_its_place_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample 'a' are not next to each other: .* byte \d+(.|\n)*tar --sort=name"):
        rows_of_archive(tmp_path, ["a.jpg", "b.jpg", "a.txt"])


def test_hidden_files_and_names_without_an_ending_are_skipped(tmp_path: Path) -> None:
    rows = rows_of_archive(tmp_path, [".hidden.jpg", "a.jpg", "._a.jpg", "README", "a.txt", "d/.x.jpg"])
    assert [(row["__key__"], sorted(row)[1:]) for row in rows] == [("a", ["jpg", "txt"])]
