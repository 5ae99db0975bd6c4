"""Files of a run on a full disk, and files of a run that are damaged: records stay whole, and good state wins."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.plane_state import pack_state, unpack_state
from mixtera_hpc.dataplane.recording.journal import read_lines
from mixtera_hpc.dataplane.resume.checkpoint_files import saved_states
from mixtera_hpc.errors import DataError
from mixtera_hpc.track.append_file import AppendFile

NUM_STEPS = 8

FULL_DISK = """
import resource, sys
from pathlib import Path
from mixtera_hpc.dataplane.recording.journal import AppendOnlyLines
from mixtera_hpc.errors import DataError
lines = AppendOnlyLines(Path(sys.argv[1]))
record = {"text": "x" * 300}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for _ in range(3):
    lines.write(record)
for _ in range(2):
    try:
        lines.write(record)
    except DataError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.write(record)
"""
"""A limit on the size of files makes `write` store a part of a record and then fail, as a full disk does."""


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written: File too large") == 2
    assert [len(line["text"]) for line in read_lines(path)] == [300] * 4


def test_a_file_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file, not a folder")
    with pytest.raises(Exception, match=r"metrics/steps\.jsonl cannot be written: .*exists|Not a directory"):
        AppendFile(tmp_path / "metrics/steps.jsonl")


@pytest.fixture
def run(collection: list[str], tmp_path: Path) -> RunFolder:
    """Return a run of some audited steps in chunks of two."""
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2", "dataplane.audit=true"]
    folder = RunFolder(tmp_path / "mine" / "run")
    with DataPlane.open(compose([*collection, *words]), Local(), folder=folder) as plane:
        for _ in zip(range(NUM_STEPS), plane, strict=False):
            pass
    return folder


def damage_line(path: Path, number: int) -> None:
    """Cut line `number`, counted from 1, in half, as two writers or a short write leave it."""
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1][: len(lines[number - 1]) // 2]
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("damage", "gap", "proven"),
    [
        (lambda run: damage_line(run.journal, 3), "2 to 3", 6),
        (lambda run: damage_line(run.audit_of_rank(1, 0), 6), "5 to 5", 7),
    ],
    ids=["journal", "audit"],
)
def test_what_a_damaged_line_does_not_cover_is_proven(
    run: RunFolder, damage: Callable[[RunFolder], None], gap: str, proven: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(run.path), "--verify"]) == 0
    damage(run)
    capsys.readouterr()
    assert main(["trace", str(run.path), "--verify"]) == 2
    printed = capsys.readouterr()
    assert f"of {proven} steps" in printed.out
    assert f"Steps {gap} cannot be proven" in printed.err
    assert main(["trace", str(run.path), "--step", "0"]) == 0


def test_a_journal_without_the_begin_of_an_attempt_is_refused(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_line(run.journal, 1)
    assert main(["trace", str(run.path), "--verify"]) == 2
    assert "has lost line 1, which began attempt 1" in capsys.readouterr().err


def make_folder(path: Path) -> None:
    path.mkdir()


def make_binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{}")


@pytest.mark.parametrize("make", [make_folder, os.mkfifo, make_binary], ids=["folder", "pipe", "binary"])
def test_a_request_that_is_not_a_text_file_is_moved_aside(tmp_path: Path, make: Callable[[Path], None]) -> None:
    run = RunFolder(tmp_path)
    run.control.mkdir()
    make(run.mixture_request)
    control = RunControl(run, watch_files=True)
    try:
        assert control.take_mixture_request() == ""
        assert control.take_mixture_request() is None
        assert [path.name.split("-")[0] for path in run.control.iterdir()] == ["mixture.json.refused"]
        run.stop_request.mkdir()
        assert control.poll() == (True, False)
        assert not run.stop_request.exists()
    finally:
        control.close()


def test_a_damaged_checkpoint_does_not_block_the_edits_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (5, 10, 15):
        run.checkpoint(step).mkdir(parents=True)
        pack_state({"next_step": step}, {}).tofile(run.checkpoint_plane_state(step))
    run.checkpoint_plane_state(10).write_bytes(b"not a state")
    (run.checkpoint(15) / "training.json").write_text(json.dumps(["not", "contents"]))
    assert [state["next_step"] for state in saved_states(run)] == [5]


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_is_refused_wherever_the_damage_is() -> None:
    """numpy, zipfile, zlib and tokenize answer damage with different exceptions."""
    state = pack_state({"next_step": 5, "names": [f"name {n}" for n in range(30)]}, {"plan": np.arange(300)})
    damages = [(place, bits) for bits in (0xFF, 0x01) for place in range(len(state))]
    contents = [state[:length] for length in range(len(state))]
    for place, bits in damages:
        contents.append(state.copy())
        contents[-1][place] ^= bits
    num_refused = 0
    for content in contents:
        try:
            unpack_state(content)
        except DataError as error:
            assert "Load another checkpoint of the run" in str(error)
            num_refused += 1
    # Some bytes of a zip file have no meaning.
    assert num_refused > 0.8 * len(contents)


FULL_WHEN_CREATED = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.recording.own_attempt import write_config_if_missing
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.prepare import prepare_run
folder = Path(sys.argv[1])
config = compose(["data.root=/data", "mixture.unit=samples", f"run.root={folder}", "run.name=n", "run.id=fixed"])
actions = [
    lambda: prepare_run(config, [], datetime.now(UTC)),
    lambda: write_config_if_missing(RunFolder(folder / "own/run"), config),
]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for action in actions:
    try:
        action()
    except LaunchError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for action in actions:
    action()
"""


def test_a_run_that_a_full_disk_prevented_is_created_by_the_same_command(tmp_path: Path) -> None:
    """The message names the file and what is safe, and a fixed `run.id` is free again."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_WHEN_CREATED, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "n/fixed cannot be written: File too large" in done.stdout
    assert "own/run/config.yaml cannot be written: File too large" in done.stdout
    assert done.stdout.count("no run yet") == 2
    assert RunFolder(tmp_path / "n/fixed").config.is_file()
