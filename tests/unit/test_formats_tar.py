"""Where members lie, with Python's own `tarfile` as the judge; and what becomes of names that are no WebDataset's."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.formats.base import ScanSpec
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.tar_headers import TarError, members
from mixtera_hpc.formats.readers.webdataset import WebDatasetFormat
from mixtera_hpc.testing.formats import read_blocks, scan_whole_shard

NAMES = [
    "short.txt",
    "d/" * 60 + "deep.txt",
    "x" * 180 + ".txt",
    "ü🙂/ж.txt",
    "a b.txt",
    "p/" * 120 + "y" * 120 + ".txt",
]


def archive(path: Path, form: int, names: list[str], **changes: Any) -> list[tuple[str, int, int]]:
    """Write one, with folders and links between the files; name, place and size of every file by `tarfile`."""
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            if number % 2:
                link = tarfile.TarInfo(f"link{number}")
                link.type, link.linkname = (
                    (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 4 // 2],
                    "z" * (90 if form == tarfile.USTAR_FORMAT else 150),
                )
                tar.addfile(link)
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"c" * info.size))
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]


def found(path: Path) -> list[tuple[str, int, int]]:
    data = path.read_bytes()
    listed = members(lambda at, size: data[at : at + size], 0, len(data), to_end=True)
    return [(m.name, m.data, m.size) for m in listed]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int, tmp_path: Path) -> None:
    names = [n for n in NAMES if form != tarfile.USTAR_FORMAT or (len(n.encode()) < 100 or n.startswith("d/"))]
    assert archive(tmp_path / "t.tar", form, names) == found(tmp_path / "t.tar")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_numbers_that_octal_cannot_hold_are_read(form: int, tmp_path: Path) -> None:
    expected = archive(tmp_path / "t.tar", form, NAMES[:3], uid=2**31, mtime=-1)
    assert expected == found(tmp_path / "t.tar")


def test_a_size_in_base_256_is_read() -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)
    (member,) = members(lambda at, size: (header if at == 0 else bytes(size))[:size], 0, 1024 + (9 << 33), to_end=True)
    assert (member.name, member.size, member.end) == ("big.bin", 9 << 33, 512 + (9 << 33))


def test_a_damaged_extended_header_is_named() -> None:
    info = tarfile.TarInfo("ü" * 200)
    header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    header[512:515] = b"999"
    with pytest.raises(TarError, match="extended header at byte 0 is damaged"):
        list(members(lambda at, size: bytes(header)[at : at + size], 0, len(header), to_end=False))


@pytest.mark.parametrize("size", ["abc", "-1024", ""])
def test_a_size_that_is_none_is_named(size: str, tmp_path: Path) -> None:
    archive(tmp_path / "t.tar", tarfile.PAX_FORMAT, ["a.txt"], pax_headers={"size": size})
    with pytest.raises(TarError, match="extended header at byte 0 is damaged: size="):
        found(tmp_path / "t.tar")


def test_a_negative_size_is_no_size() -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"-0000002000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(TarError, match="no valid header at byte 0"):
        list(members(lambda at, size: bytes(header)[at : at + size], 0, 512, to_end=False))


def test_archives_that_were_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    for name, names in (("a.tar", ["a.txt", "b.txt"]), ("b.tar", ["c.txt"])):
        archive(tmp_path / name, tarfile.PAX_FORMAT, names)
    together = tmp_path / "t.tar"
    together.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert [row["__key__"] for row in rows_of(together)] == ["a", "b", "c"]
    together.write_bytes(together.read_bytes()[: 20 * 512 + 512])
    with pytest.raises(TarError, match="without an end mark"):
        found(together)


def rows_of_archive(tmp_path: Path, names: list[str]) -> list[dict[str, Any]]:
    archive(tmp_path / "t.tar", tarfile.PAX_FORMAT, names)
    return rows_of(tmp_path / "t.tar")


def rows_of(path: Path) -> list[dict[str, Any]]:
    blocks = read_blocks(scan_whole_shard(WebDatasetFormat(), path, ScanSpec(text=None, rows=True)))
    reader = WebDatasetFormat().open(path, None, BlockCache())
    rows = [row for block, lengths in blocks for row in reader.payloads(block, lengths, np.arange(block.rows))]
    reader.close()
    return rows


def test_consecutive_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    names = ["a.jpg", "a.seg.png", "b.jpg", "dir.v1/a.JPG", "dir.v1/a.cls", "./c.bin", "a.txt"]
    rows = rows_of_archive(tmp_path, names)
    assert [(row["__key__"], sorted(row)[1:]) for row in rows] == [
        ("a", ["jpg", "seg.png"]),
        ("b", ["jpg"]),
        ("dir.v1/a", ["cls", "jpg"]),
        ("c", ["bin"]),
        ("a", ["txt"]),
    ]


def test_hidden_files_and_names_without_ending_are_passed_over(tmp_path: Path) -> None:
    rows = rows_of_archive(tmp_path, [".hidden.jpg", "a.jpg", "._a.jpg", "README", "a.txt", "d/.x.jpg"])
    assert [(row["__key__"], sorted(row)[1:]) for row in rows] == [("a", ["jpg", "txt"])]
