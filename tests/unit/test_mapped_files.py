"""Pages of mapped token files do not stay in the memory of a process for ever."""

from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.dataplane.reading.stored import mapped_files
from mixtera_hpc.dataplane.reading.stored.mapped_files import RELEASE_EVERY_S, MappedFiles, map_array
from mixtera_hpc.formats.file_memory import shared_bytes

SIZE = 16 << 20


def test_pages_are_released_now_and_then_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.Generator(np.random.Philox(1)).integers(0, 1 << 16, SIZE // 2, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    now_s = 100.0
    files = MappedFiles(1, lambda _: map_array(tmp_path / "tokens.bin", np.dtype("<u2")), clock=lambda: now_s)
    files.map(np.array([0]))
    memory = files.memory(0).tokens

    def released_by_limit() -> int:
        assert (memory == tokens).all(), "every page is in memory"
        before = shared_bytes()
        files.limit_memory()
        return before - shared_bytes()

    assert released_by_limit() < SIZE // 4, "the file is small"
    monkeypatch.setattr(mapped_files, "MAX_RESIDENT_BYTES", SIZE // 2)
    assert released_by_limit() > SIZE // 2
    assert released_by_limit() < SIZE // 4, "the last release is less than a while ago"
    now_s += RELEASE_EVERY_S
    assert released_by_limit() > SIZE // 2


def test_the_files_that_were_not_used_for_longest_are_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_files, "MAX_MAPPED_FILES", 3)
    files = MappedFiles(6, lambda number: np.zeros(number, np.uint8))
    for requested, mapped in (
        ([0, 1, 2], [0, 1, 2]),
        ([1], [0, 1, 2]),
        ([3, 3], [1, 2, 3]),
        ([0, 2], [0, 2, 3]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([2, 3], [0, 1, 2, 3]),
        ([5], [2, 3, 5]),
    ):
        files.map(np.array(requested))
        assert np.flatnonzero(files.is_mapped(np.arange(6))).tolist() == sorted(files._files) == mapped
        assert files._mapped_bytes == sum(mapped)


def test_a_file_that_was_truncated_inside_a_token_has_the_tokens_before_it(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(bytes([1, 0, 2, 0, 3]))
    assert map_array(tmp_path / "tokens.bin", np.dtype("<u2")).tolist() == [1, 2]
