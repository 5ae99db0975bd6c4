"""Whatever cannot be written costs one message; what was written before stays, and why a run ended stays known."""

import contextlib
import errno
import logging
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtera_hpc.comm.sentinel import record_failure
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane_state import pack_state
from mixtera_hpc.errors import ConfigError, DataError, UserError, exit_code_of
from mixtera_hpc.index.disk_errors import explain_disk_errors
from mixtera_hpc.launch.attempts import ExitRecord, end_attempt
from mixtera_hpc.training.checkpoint import Checkpoint, load_newest_checkpoint, write_checkpoint


@contextmanager
def no_space() -> Iterator[None]:
    """Let every write to a file fail beyond its first 100 bytes, as on a disk that is almost full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount 256 KB of memory as a disk of its own; only root may."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode:
        pytest.skip("this container may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


def checkpoint(step: int) -> Checkpoint:
    model = {"weight": torch.full((100, 100), float(step))}
    state = pack_state({"next_step": step}, {"plan": np.arange(step)})
    return Checkpoint(step=step, model_settings={}, model=model, optimizer={}, dataplane=state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
@pytest.mark.parametrize(("state", "reason"), [(full, "No space left|unexpected pos"), (read_only, "Read-only")])
def test_a_full_or_read_only_disk_costs_one_message_and_no_checkpoint(
    state: Callable[[Path], AbstractContextManager[None]], reason: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    with mounted(run.checkpoints):
        write_checkpoint(run, checkpoint(1), keep=2)
        with state(run.checkpoints):
            with pytest.raises(UserError) as caught:
                write_checkpoint(run, checkpoint(2), keep=2)
            assert exit_code_of(caught.value) == 2
            message = str(caught.value)
            assert str(run.checkpoints) in message and re.search(reason, message), message
            assert "mixtera-hpc resume" in message
            newest = load_newest_checkpoint(run)
            assert newest is not None and newest.step == 1
        write_checkpoint(run, checkpoint(2), keep=2)
        assert run.checkpoint_steps() == [1, 2]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_checkpoint(run, checkpoint(1), keep=1)
    with no_space(), pytest.raises(DataError, match=r"The checkpoint .*step_\d*2 cannot be written: .*\n  Earlier"):
        write_checkpoint(run, checkpoint(2), keep=1)
    newest = load_newest_checkpoint(run)
    assert newest is not None and newest.step == 1
    # The next attempt writes it.
    write_checkpoint(run, checkpoint(2), keep=1)
    assert run.checkpoint_steps() == [2]


def test_only_what_cannot_be_written_is_called_so(tmp_path: Path) -> None:
    """Files of another user below the folder cannot be written; a shard that cannot be read is not below it."""
    own = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "i.h5.tokens" / "lock"))
    with pytest.raises(ConfigError, match=r"The store cannot be written: Permission denied\.\n  Make it writable\."):
        raise_explained(own, tmp_path / "i.h5.tokens")
    descriptor = 7
    for name in (str(tmp_path / "data" / "0.jsonl"), descriptor, None):
        with pytest.raises(PermissionError):
            raise_explained(PermissionError(errno.EACCES, "Permission denied", name), tmp_path / "i.h5.tokens")


def raise_explained(error: OSError, folder: Path) -> None:
    with explain_disk_errors(ConfigError, folder, "The store cannot be written", "Make it writable."):
        raise error


def test_a_failure_that_cannot_be_recorded_leaves_room_for_another(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    with no_space():
        record_failure(str(path), {"rank": 0, "reason": "x" * 4096})
    assert not path.exists()
    record_failure(str(path), {"rank": 1, "reason": "y"})
    assert '"rank": 1' in path.read_text()


def test_an_end_that_cannot_be_recorded_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.path.joinpath("attempts").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        end_attempt(run, 1, ExitRecord(exit_code=2, elapsed_s=1))
    assert "exit.json cannot be written" in caplog.text
