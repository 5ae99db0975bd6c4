"""File systems that do less than ext4: NFS and FUSE keep removed files that are open, exFAT has no hard links."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, write_request
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.training.checkpoint import Checkpoint, write_checkpoint


def test_a_build_ends_in_order_where_removed_files_that_are_open_stay(
    tmp_path: Path, answers: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink
    hidden = []

    def keep_lock(path: Any, *, dir_fd: int | None = None) -> None:
        """Do what NFS does with a file that is still open: give it another name."""
        if path == "lock":
            hidden.append(path)
            os.rename(path, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    monkeypatch.setattr(os, "unlink", keep_lock)
    for _ in range(2):
        answered = answers()
        assert (answered["build"], answered["verify"]) == ("9 samples, 0 bad rows, 0 damaged", "fresh")
    assert len(hidden) == 2


def test_a_mixture_is_requested_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    request = MixtureRequest(chunk=3, mixture=MixtureConfig())
    write_request(run, request)
    assert json.loads(run.mixture_request.read_text())["chunk"] == 3
    with pytest.raises(ConfigError, match="holds a request that the run has not read yet"):
        write_request(run, request)
    assert [path.name for path in run.mixture_request.parent.iterdir()] == [run.mixture_request.name]


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **options: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING, "mixtera_hpc"):
        for step in (1, 2):
            state = Checkpoint(step=step, model_settings={}, model={}, optimizer={}, dataplane=np.zeros(3, np.uint8))
            write_checkpoint(run, state, keep=1)
    assert run.checkpoint_steps() == [1, 2]
    assert "step_00000001 cannot be removed: Directory not empty. Remove it." in caplog.text
