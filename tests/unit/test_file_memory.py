"""Files in memory without a descriptor."""

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.formats import file_memory
from mixtera_hpc.formats.file_memory import load_pages, map_descriptor, release_pages


def mapped_paths() -> str:
    return Path("/proc/self/maps").read_text()


def test_a_mapping_outlives_its_descriptor_and_ends_with_its_last_array(tmp_path: Path) -> None:
    path = tmp_path / "tokens with a space.bin"
    np.arange(5000, dtype="<u2").tofile(path)
    descriptor = os.open(path, os.O_RDONLY)
    tokens = map_descriptor(descriptor).view("<u2")
    os.close(descriptor)
    end = tokens[4000:]
    del tokens
    gc.collect()
    assert end.tolist() == list(range(4000, 5000))
    assert path.name in mapped_paths()
    del end
    assert path.name not in mapped_paths()


def test_a_mapping_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"abc")
    with path.open("rb") as file:
        content = map_descriptor(file.fileno())
    assert content.tobytes() == b"abc"
    with pytest.raises(ValueError, match="read-only"):
        content[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        content.flags.writeable = True


def test_a_mapping_is_few_objects_for_the_garbage_collector(tmp_path: Path) -> None:
    """A reader may map 16,384 files, all of different sizes."""
    arrays = []
    gc.collect()
    before = len(gc.get_objects())
    for size in range(1, 101):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        with path.open("rb") as file:
            arrays.append(map_descriptor(file.fileno()))
    gc.collect()
    assert len(gc.get_objects()) - before < 500


def test_an_empty_file_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert len(map_descriptor(file.fileno())) == 0


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "file", os.O_WRONLY)
    try:
        with pytest.raises(PermissionError):
            map_descriptor(descriptor)
    finally:
        os.close(descriptor)


def test_no_page_is_released_for_an_empty_file() -> None:
    """Memory of the interpreter stands for an empty file, and `MADV_DONTNEED` fills such memory with zeros."""
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page.write(b"x" * mmap.PAGESIZE)
        release_pages(np.frombuffer(page, np.uint8).ctypes.data + 100, 0)
        assert page[:] == b"x" * mmap.PAGESIZE


def test_a_kernel_that_cannot_load_pages_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("rb") as file:
        content = map_descriptor(file.fileno())
    assert load_pages(content.ctypes.data, content.nbytes)
    # Linux before 5.14 takes the number for an unknown one.
    monkeypatch.setattr(file_memory, "_MADV_POPULATE_READ", 9999)
    assert not load_pages(content.ctypes.data, content.nbytes)
