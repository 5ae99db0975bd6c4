"""After a kill, a truncation or damage, the index is the old one, the new one, or refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.layout import building_folder
from mixtera_hpc.index.read.open import open_index

NUM_SHARDS = 8
PROGRAM = """
import sys
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.index.build.build import build_index
root = sys.argv[1]
properties = {"n": {"path": "n", "kind": "number"}, "c": "c"}
config = from_plain(Config, {"data": {"root": root, "properties": properties}, "index": {"path": root + "/index.h5"}})
build_index(config, progress=lambda state: print("unit", flush=True) or sys.stdin.readline())
print("done", flush=True)
"""


def configured(root: Path) -> Config:
    properties = {"n": {"path": "n", "kind": "number"}, "c": "c"}
    data = {"root": str(root), "properties": properties}
    return from_plain(Config, {"data": data, "index": {"path": str(root / "index.h5")}})


def write_shards(root: Path, rows: int) -> None:
    for i in range(NUM_SHARDS):
        lines = [json.dumps({"text": f"shard {i} row {j}", "c": "abc"[j % 3], "n": j / 7}) for j in range(rows + i)]
        (root / f"{i}.jsonl").write_text("\n".join(lines))


def contents(path: Path) -> str:
    """Return everything that can be read of an index."""
    with open_index(path) as index:
        blocks = index.tables.blocks
        samples = index.samples.read_many(blocks.first_sample.tolist(), blocks.rows.tolist())
        columns = (samples.combo, samples.length, samples.tokens, *samples.numbers.values())
        return repr((index.tables, index.text, index.data_root, index.fingerprint)) + "".join(
            c.tobytes().hex() for c in columns
        )


def build_and_kill(root: Path, after_units: int) -> None:
    """Let a build scan some units, then SIGKILL it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    for _ in range(after_units):
        assert process.stdout.readline() == b"unit\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.stdout.readline() == b"unit\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)


@pytest.mark.parametrize("after_units", [0, 3, NUM_SHARDS - 1])
def test_a_killed_build_leaves_the_old_index_and_is_resumed(after_units: int, tmp_path: Path) -> None:
    write_shards(tmp_path, 5)
    build_index(configured(tmp_path))
    old = contents(tmp_path / "index.h5")
    write_shards(tmp_path, 9)
    build_and_kill(tmp_path, after_units)
    assert contents(tmp_path / "index.h5") == old
    report = build_index(configured(tmp_path))
    assert report.resumed_units == after_units + 1 and report.units == NUM_SHARDS
    resumed = (tmp_path / "index.h5").read_bytes()
    build_index(configured(tmp_path))
    assert (tmp_path / "index.h5").read_bytes() == resumed, "a resumed build writes the same bytes"
    assert not building_folder(tmp_path / "index.h5").exists()


@pytest.mark.parametrize("delay_s", [0, 0.002, 0.005, 0.01, 0.02, 0.05])
def test_a_build_killed_while_it_writes_leaves_the_old_index_or_the_new_one(delay_s: float, tmp_path: Path) -> None:
    write_shards(tmp_path, 9)
    build_index(configured(tmp_path))
    new = contents(tmp_path / "index.h5")
    write_shards(tmp_path, 5)
    build_index(configured(tmp_path))
    old = contents(tmp_path / "index.h5")
    write_shards(tmp_path, 9)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    for _ in range(NUM_SHARDS):
        assert process.stdout.readline() == b"unit\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
    time.sleep(delay_s)
    process.kill()
    process.communicate(timeout=600)
    after_kill = contents(tmp_path / "index.h5")
    assert without_times(after_kill) in (without_times(old), without_times(new))


def without_times(text: str) -> str:
    return re.sub(r"mtime_ns=array\([^)]*\)", "", text)


def test_after_a_killed_first_build_opening_says_that_it_was_interrupted(tmp_path: Path) -> None:
    write_shards(tmp_path, 5)
    build_and_kill(tmp_path, 1)
    with pytest.raises(PropertyIndexError, match="is being built, or a build was interrupted"):
        open_index(tmp_path / "index.h5")


@pytest.mark.parametrize("shard", ["0.jsonl", "7.jsonl"])
def test_logs_of_other_data_are_not_used(shard: str, tmp_path: Path) -> None:
    write_shards(tmp_path, 5)
    build_and_kill(tmp_path, 3)
    (tmp_path / shard).write_text('{"text": "other", "c": "z"}')
    assert build_index(configured(tmp_path)).resumed_units == 0


def test_a_truncated_log_loses_only_the_truncated_units(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    build_index(configured(tmp_path))
    expected = (tmp_path / "index.h5").read_bytes()
    build_and_kill(tmp_path, 4)
    folder = building_folder(tmp_path / "index.h5")
    shutil.copytree(folder, tmp_path / "saved")
    (log,) = (tmp_path / "saved").glob("*.scanlog")
    content = log.read_bytes()
    resumed = set()
    for cut in range(0, len(content), len(content) // 40):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", folder)
        (folder / log.name).write_bytes(content[:cut] + b"\0" * (len(content) - cut) * (cut % 2))
        resumed.add(build_index(configured(tmp_path)).resumed_units)
        assert (tmp_path / "index.h5").read_bytes() == expected
    assert resumed == {0, 1, 2, 3, 4}


def test_a_second_build_of_one_index_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"unit\n"
    with pytest.raises(PropertyIndexError, match="Another process is building this index"):
        build_index(configured(tmp_path))
    out, _ = process.communicate(b"\n" * NUM_SHARDS, timeout=600)
    assert out.endswith(b"done\n")
    open_index(tmp_path / "index.h5").close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, str]:
    """Return a folder, the bytes of an index, and its contents."""
    folder = tmp_path_factory.mktemp("small")
    write_shards(folder, 40)
    build_index(configured(folder))
    path = folder / "index.h5"
    return folder, path.read_bytes(), contents(path)


def test_a_truncated_file_is_refused(small: tuple[Path, bytes, str]) -> None:
    folder, content, _ = small
    path = folder / "cut.h5"
    for size in {*range(0, len(content), 41), *range(600), *range(len(content) - 600, len(content))}:
        path.write_bytes(content[:size])
        with pytest.raises(PropertyIndexError, match=r"cut\.h5 (is damaged or truncated|is not a property index)"):
            contents(path)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_byte_is_refused_or_changes_nothing(data: Any, small: tuple[Path, bytes, str]) -> None:
    folder, content, expected = small
    place = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    path = folder / "index.h5"
    path.write_bytes(damaged)
    try:
        read = contents(path)
    except PropertyIndexError:
        return
    assert read == expected
