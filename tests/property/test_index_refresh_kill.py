"""After a kill of a refresh or derivation, the index is the old or the new one, and the work is resumed."""

import json
import os
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
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.layout import building_folder
from mixtera_hpc.index.read.open import open_index

NUM_SHARDS = 6
BASE = {"n": {"path": "n", "kind": "number"}, "c": "c"}
FUNCTION = {"bucket": {"function": "mixtera_hpc.index.document_functions.length_bucket"}}
WORK = {"refresh": refresh_index, "derive": derive_properties}
PROGRAM = """
import json, sys
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
work = {"refresh": refresh_index, "derive": derive_properties}[sys.argv[1]]
config = from_plain(Config, json.loads(sys.argv[2]))
work(config, progress=lambda state: print("unit", flush=True) or sys.stdin.readline())
"""


def settings_of(root: Path, action: str) -> dict[str, Any]:
    properties = BASE | (FUNCTION if action == "derive" else {})
    data = {"root": str(root / "data"), "properties": properties}
    return {"data": data, "index": {"path": str(root / "i.h5"), "block_rows": 16}}


def write_shards(root: Path, names: list[str]) -> None:
    (root / "data").mkdir(exist_ok=True)
    for i, name in enumerate(names):
        rows = [json.dumps({"text": f"{name} row {j} " * j, "c": "abc"[j % 3], "n": j / 7}) for j in range(30 + i)]
        (root / "data" / f"{name}.jsonl").write_text("\n".join(rows))


def prepare(root: Path, action: str) -> bytes:
    """Build an index, prepare work of six units, and return the bytes of the index."""
    write_shards(root, [f"{i}" for i in range(NUM_SHARDS)])
    build_index(from_plain(Config, settings_of(root, "build")))
    if action == "refresh":
        write_shards(root, [f"new{i}" for i in range(NUM_SHARDS - 1)])
        write_shards(root, ["3"])
    return (root / "i.h5").read_bytes()


def start(root: Path, action: str) -> "subprocess.Popen[bytes]":
    arguments = [sys.executable, "-c", PROGRAM, action, json.dumps(settings_of(root, action))]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_after(root: Path, action: str, units: int) -> None:
    """Let the work finish some units, then SIGKILL it."""
    process = start(root, action)
    assert process.stdin and process.stdout
    for _ in range(units - 1):
        assert process.stdout.readline() == b"unit\n", process.communicate()
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.stdout.readline() == b"unit\n", process.communicate()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)


def finished(root: Path, action: str) -> tuple[bytes, int]:
    """Do the remaining work; return the new bytes and the number of resumed units."""
    report: Any = WORK[action](from_plain(Config, settings_of(root, action)))
    resumed = report.resumed_units if action == "derive" else report.build.resumed_units
    return (root / "i.h5").read_bytes(), resumed


@pytest.mark.parametrize("action", ["refresh", "derive"])
@pytest.mark.parametrize("units", [1, 4, 6])
def test_a_kill_leaves_the_old_index_and_the_work_is_resumed(action: str, units: int, tmp_path: Path) -> None:
    old = prepare(tmp_path, action)
    shutil.copytree(tmp_path, tmp_path.with_name("alone"), dirs_exist_ok=True, copy_function=shutil.copy2)
    kill_after(tmp_path, action, units)
    assert (tmp_path / "i.h5").read_bytes() == old
    with open_index(tmp_path / "i.h5") as index:
        assert index.tables.num_samples == sum(30 + i for i in range(NUM_SHARDS))
    new, resumed = finished(tmp_path, action)
    assert resumed == units and new != old
    shutil.rmtree(building_folder(tmp_path / "i.h5"), ignore_errors=True)
    (tmp_path / "i.h5").write_bytes(old)
    assert finished(tmp_path, action) == (new, 0), "resumed or not, the bytes are the same"


@pytest.mark.parametrize("action", ["refresh", "derive"])
@given(delay_ms=st.integers(0, 60))
@settings(max_examples=8, deadline=None)
def test_a_kill_while_writing_leaves_the_old_index_or_the_new_one(
    action: str, tmp_path_factory: pytest.TempPathFactory, delay_ms: int
) -> None:
    root = tmp_path_factory.mktemp("kill")
    old = prepare(root, action)
    process = start(root, action)
    assert process.stdin and process.stdout
    for _ in range(NUM_SHARDS):
        assert process.stdout.readline() == b"unit\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
    time.sleep(delay_ms / 1000)
    process.kill()
    process.communicate(timeout=600)
    after_kill = (root / "i.h5").read_bytes()
    open_index(root / "i.h5").close()
    if after_kill == old:
        assert finished(root, action)[0] != old
    else:
        (root / "i.h5").write_bytes(old)
        assert finished(root, action)[0] == after_kill
