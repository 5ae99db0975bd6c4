"""Whatever cannot be written costs one message; what was written before stays, and why a run ended stays known."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtera_hpc.comm.sentinel import record_failure
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane_state import pack_state
from mixtera_hpc.errors import DataError
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


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def checkpoint(step: int) -> Checkpoint:
        model = {"weight": torch.full((100, 100), float(step))}
        state = pack_state({"next_step": step}, {"plan": np.arange(step)})
        return Checkpoint(step=step, model_settings={}, model=model, optimizer={}, dataplane=state)

    write_checkpoint(run, checkpoint(1), keep=1)
    with no_space(), pytest.raises(DataError, match=r"The checkpoint .*step_\d*2 cannot be written: .*\n  Earlier"):
        write_checkpoint(run, checkpoint(2), keep=1)
    newest = load_newest_checkpoint(run)
    assert newest is not None and newest.step == 1
    # The next attempt writes it.
    write_checkpoint(run, checkpoint(2), keep=1)
    assert run.checkpoint_steps() == [2]


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
