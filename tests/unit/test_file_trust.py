"""Files of a run that others may not write, and control files of others, which do not count."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.config.files.file_trust import is_trusted_request
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.control import RunControl

OWNER, STRANGER, GROUP, OTHER_GROUP = 4001, 4002, 4101, 4102
"""Ids that no user of this machine has."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of other users can be made by root only")

WRITE_RUN = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from mixtera_hpc import DataPlane, compose
from mixtera_hpc.config.run_folder import RunFolder
with DataPlane.open(compose(sys.argv[3:]), folder=RunFolder(Path(sys.argv[2]))) as plane:
    next(iter(plane))
"""


@pytest.mark.parametrize(("umask", "allowed"), [("000", 0o775), ("077", 0o700), ("027", 0o750)])
def test_files_of_a_run_follow_the_umask_and_are_never_writable_for_all(
    umask: str, allowed: int, collection: list[str], tmp_path: Path
) -> None:
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.audit=true", "dataplane.workers=0"]
    run = tmp_path / "mine/run"
    subprocess.run([sys.executable, "-c", WRITE_RUN, umask, str(run), *collection, *words], check=True, timeout=600)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*")}
    assert len(modes) > 5
    assert {path: oct(mode) for path, mode in modes.items() if mode & ~allowed} == {}
    if umask == "000":
        assert all(mode & stat.S_IWGRP for mode in modes.values()), "the user's umask lets the group write"


def control_folder(folder: Path, mode: int) -> RunFolder:
    """Return a run whose control folder belongs to `OWNER` and `GROUP`."""
    run = RunFolder(folder)
    run.control.mkdir()
    os.chown(run.control, OWNER, GROUP)
    run.control.chmod(mode)
    return run


@as_root
@pytest.mark.parametrize(
    ("mode", "user", "group", "counts"),
    [
        (0o755, OWNER, GROUP, True),
        (0o755, OWNER, OTHER_GROUP, True),
        (0o755, STRANGER, GROUP, False),
        (0o775, STRANGER, GROUP, True),
        (0o2775, STRANGER, GROUP, True),
        (0o775, STRANGER, OTHER_GROUP, False),
        (0o777, STRANGER, GROUP, False),
        (0o1777, STRANGER, OTHER_GROUP, False),
    ],
)
def test_a_control_file_counts_for_its_owner_and_a_group_that_may_write(
    mode: int, user: int, group: int, counts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = control_folder(tmp_path, mode)
    for path in (run.stop_request, run.save_request, run.mixture_request):
        path.touch()
        os.chown(path, user, group)
    control = RunControl(run, watch_files=True)
    try:
        with caplog.at_level(logging.WARNING, "mixtera_hpc"):
            assert control.stop_was_requested(look_for_file=True) == counts
            assert control.poll() == (counts, counts)
            assert (control.take_mixture_request() is not None) == counts
            control.poll()
    finally:
        control.close()
    assert run.stop_request.exists() != counts, "files of others stay"
    assert caplog.text.count("is ignored: it belongs neither") == (0 if counts else 3)


def test_a_link_that_leads_nowhere_is_no_request(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.control.mkdir()
    for path in (run.stop_request, run.save_request, run.mixture_request):
        path.symlink_to(tmp_path / "missing")
    control = RunControl(run, watch_files=True)
    try:
        assert not control.stop_was_requested(look_for_file=True)
        assert control.poll() == (False, False)
        assert control.take_mixture_request() is None
        (tmp_path / "missing").touch()
        assert control.poll() == (True, True)
    finally:
        control.close()


@as_root
def test_a_link_of_a_stranger_does_not_count(tmp_path: Path) -> None:
    run = control_folder(tmp_path, 0o755)
    (tmp_path / "own").touch()
    os.chown(tmp_path / "own", OWNER, GROUP)
    run.stop_request.symlink_to(tmp_path / "own")
    os.chown(run.stop_request, STRANGER, OTHER_GROUP, follow_symlinks=False)
    assert not is_trusted_request(run.stop_request)


@as_root
@pytest.mark.parametrize(
    ("mode", "user", "group", "counts"),
    [
        (0o755, 0, 0, True),
        (0o755, STRANGER, GROUP, False),
        (0o2775, STRANGER, GROUP, True),
        (0o777, STRANGER, GROUP, False),
    ],
)
def test_the_batch_script_ignores_requests_of_others(
    mode: int, user: int, group: int, counts: bool, tmp_path: Path
) -> None:
    run = control_folder(tmp_path, mode)
    run.cancelled.touch()
    os.chown(run.cancelled, user, group)
    script = (Path(__file__).parents[2] / "mixtera_hpc/launch/batch/prologue.sh").read_text()
    function = script[script.index("is_request() {") :].partition("\n}\n")[0] + "\n}\n"
    program = f'folder="$1"\n{function}is_request "$folder/control/cancelled"'
    done = subprocess.run(["bash", "-c", program, "bash", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == int(not counts)
    assert ("is ignored" in done.stderr) == (not counts)
