"""`with Replicas():` under every launcher: one process group, the variables of torchrun, and an orderly end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("replicas_launch_program.py")
COMMANDS = {
    "python": [sys.executable],
    "mpiexec": [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
}
SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]
FAILURE_LIMIT_S = 20
"""Longest time from the exception of one rank to the end of the launcher."""


def launch(launcher: str, mode: str, collection: list[str], **env: str) -> Any:
    command = [*COMMANDS[launcher], str(PROGRAM), mode, *collection, *SMALL]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **env}, check=False)


def rows_of(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(rows, key=lambda row: row["rank"])


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_two_ranks_get_a_group_and_the_variables_of_torchrun(launcher: str, collection: list[str]) -> None:
    rows = rows_of(launch(launcher, "serve", collection))

    assert [row["positions"] for row in rows] == [[0, 1], [2, 3]]
    for rank, row in enumerate(rows):
        assert (row["sum"], row["has_group"], row["has_group_after"], row["restored"]) == (2.0, True, False, True)
        inside = row["inside"]
        assert (inside["RANK"], inside["WORLD_SIZE"], inside["GROUP_RANK"]) == (str(rank), "2", "0")
        assert (inside["LOCAL_RANK"], inside["LOCAL_WORLD_SIZE"]) == (str(rank), "2")
        assert inside["MASTER_ADDR"]
        assert int(inside["MASTER_PORT"]) > 0


def test_one_process_needs_neither_a_group_nor_variables(collection: list[str]) -> None:
    (row,) = rows_of(launch("python", "serve", collection))

    assert (row["sum"], row["has_group"], row["inside"]) == (1.0, False, {})
    assert row["positions"] == [0, 1, 2, 3]


def test_variables_of_another_launcher_are_refused(collection: list[str]) -> None:
    done = launch("mpiexec", "serve", collection, RANK="0", WORLD_SIZE="2")

    assert done.returncode != 0
    assert "RANK is 0, but this process is rank 1 of 2" in done.stderr
    assert "Unset RANK and WORLD_SIZE" in done.stderr


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_an_exception_outside_of_a_data_plane_ends_all_ranks(
    launcher: str, collection: list[str], tmp_path: Path
) -> None:
    done = launch(launcher, "fail", collection, FAILED_AT=str(tmp_path / "failed_at"))
    ended_at = time.time()

    assert done.returncode != 0
    assert ended_at - float((tmp_path / "failed_at").read_text()) < FAILURE_LIMIT_S
    assert "[rank 1 on" in done.stderr
    assert "ValueError: broken on purpose" in done.stderr
