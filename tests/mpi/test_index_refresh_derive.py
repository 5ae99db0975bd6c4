"""Refresh and derive on many ranks; ranks that are late; builds that are killed repeatedly."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.index.layout import building_folder

MPIEXEC = Path(sys.executable).with_name("mpiexec")
FUNCTION = "mixtera_hpc.index.document_functions.length_bucket"
DERIVED = f"data.properties.bucket={{function: {FUNCTION}, kind: category}}"


def write(folder: Path, name: str, rows: int) -> None:
    objects = [{"text": f"{name} {j} " * (j % 40), "c": f"v{j % 5}", "n": j} for j in range(rows)]
    (folder / name).write_text("\n".join(map(json.dumps, objects)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        write(folder, f"{i}.jsonl", 30 * i + 5)
    return folder


def command(ranks: int, action: str, data: Path, index: Path, *words: str) -> list[str]:
    settings = [f"data.root={data}", f"index.path={index}", "data.properties={c: c, n: {path: n, kind: number}}"]
    verb = [sys.executable, "-m", "mpi4py", "-m", "mixtera_hpc", "index", action, "--json"]
    return [str(MPIEXEC), "-n", str(ranks), *verb, *settings, *words]


def run(ranks: int, action: str, data: Path, index: Path, *words: str) -> dict[str, object]:
    """Return the report of an action on some ranks of mpiexec; a single one is this process."""
    arguments = command(ranks, action, data, index, *words)
    if ranks == 1:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(arguments[arguments.index("index") :]) == 0
        return dict(json.loads(printed.getvalue()))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_refresh_and_derive_write_the_same_bytes_on_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    indexes = {ranks: tmp_path / f"{ranks}" / "i.h5" for ranks in (1, 4)}
    for ranks, index in indexes.items():
        index.parent.mkdir()
        run(ranks, "build", data, index, "data.exclude=[3.jsonl,new.jsonl]")
        write(data, "new.jsonl", 50)
        os.utime(data / "new.jsonl", ns=(0, 10**18))
        report = run(ranks, "refresh", data, index)
        assert report["added"] == ["3.jsonl", "new.jsonl"]
        run(ranks, "derive", data, index, DERIVED)
    (data / "new.jsonl").unlink()
    assert indexes[1].read_bytes() == indexes[4].read_bytes()


def test_a_late_rank_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    program = Path(__file__).with_name("parallel_scan_program.py")
    arguments = [MPIEXEC, "-n", "3", sys.executable, "-m", "mpi4py", program, tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "all done\n", done.stderr


def test_deep_verify_on_several_ranks_names_what_changed(data: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.h5"
    run(2, "build", data, index)
    status = (data / "4.jsonl").stat()
    content = (data / "4.jsonl").read_bytes()
    try:
        (data / "4.jsonl").write_bytes(content.replace(b"v1", b"v9", 1))
        os.utime(data / "4.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert run(3, "verify", data, index)["fresh"], "size and modification time are unchanged"
        done = subprocess.run(command(3, "verify", data, index, "--deep"), capture_output=True, text=True, timeout=900)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout)["changed"] == [
            {"path": "4.jsonl", "problem": "its first or last MiB differs"},
        ]
    finally:
        (data / "4.jsonl").write_bytes(content)
        os.utime(data / "4.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kills", [3, pytest.param(8, marks=pytest.mark.full)])
def test_a_repeatedly_killed_build_writes_the_same_bytes(kills: int, data: Path, tmp_path: Path) -> None:
    """SIGKILL every process at random times; each build continues the one before with another number of ranks."""
    expected = tmp_path / "alone.h5"
    run(1, "build", data, expected)
    index = tmp_path / "i.h5"
    rng = random.Random(5)
    for attempt in range(kills):
        ranks = 1 + attempt % 3
        process = subprocess.Popen(
            command(ranks, "build", data, index),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        began = time.monotonic()
        delay_s = rng.random() * 0.25
        while process.poll() is None and not building_folder(index).exists() and time.monotonic() - began < 600:
            time.sleep(0.002)
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):  # It may have ended unobserved.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(600)
        if index.exists():
            assert index.read_bytes() == expected.read_bytes()
            index.unlink()
    run(2, "build", data, index)
    assert index.read_bytes() == expected.read_bytes()
    assert not building_folder(index).exists()
