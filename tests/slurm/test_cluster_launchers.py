"""A user's own loop under the launchers of the real cluster; `tests/mpi/launcher_program.py` is the loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "mpi/launcher_program.py"
SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]
LIMIT_S = 900
"""A guard against hanging."""
SRUN = ["srun", "--kill-on-bad-exit=1", "--time=20"]
"""Without the first option, srun goes on when a task aborts, and the other tasks wait for it."""

pytestmark = pytest.mark.slurm

TORCHRUN_ON_EVERY_NODE = """\
#!/bin/bash
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 "{python}" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node 2 \\
    --rdzv-backend c10d --rdzv-endpoint "$head:{port}" "$@"
"""


def positions(output: str) -> list[list[int]]:
    return sorted(json.loads(line)["positions"] for line in output.splitlines() if "positions" in line)


def run(command: list[str], folder: Path) -> str:
    """Run a command of Slurm and return what it and its job printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "stdout").open("w+") as stdout, (folder / "stderr").open("w+") as stderr:
        try:
            code = subprocess.run(
                command, stdout=stdout, stderr=stderr, timeout=LIMIT_S, cwd=folder, env=env
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    printed = (folder / "stdout").read_text() + "".join(path.read_text() for path in folder.glob("*.out"))
    assert code == 0, f"exit code {code} (None: no end within {LIMIT_S} s)\n{printed}{(folder / 'stderr').read_text()}"
    return printed


def batch(folder: Path, resources: list[str], script: str, arguments: list[str]) -> str:
    """Run a batch script to its end and return what it printed."""
    path = folder / "job.sh"
    path.write_text(script)
    output = ["--output", str(folder / "job.out")]
    return run(["sbatch", "--wait", "--time=20", *resources, *output, str(path), *arguments], folder)


@pytest.fixture
def loop(collection: list[str]) -> list[str]:
    """Return the arguments of a loop that serves one batch."""
    return [str(PROGRAM), "loop", *collection, *SMALL]


def test_torchrun_started_by_one_task_per_node_is_one_job(loop: list[str], tmp_path: Path, free_port: int) -> None:
    script = TORCHRUN_ON_EVERY_NODE.format(python=sys.executable, port=free_port)
    printed = batch(tmp_path, ["--nodes=2", "--ntasks-per-node=1"], script, loop)

    assert positions(printed) == [[0], [1], [2], [3]]


def test_torchrun_inside_one_task_of_srun_is_one_job(loop: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    printed = run([*SRUN, "-n1", *torchrun, *loop], tmp_path)

    assert positions(printed) == [[0, 1], [2, 3]]


def test_srun_with_the_right_plugin_shares_a_batch_through_mpi(loop: list[str], tmp_path: Path) -> None:
    printed = run([*SRUN, "-n2", "--nodes=2", "--mpi=pmi2", sys.executable, *loop], tmp_path)

    assert positions(printed) == [[0, 1], [2, 3]]


def test_srun_with_a_plugin_that_does_not_fit_is_refused(loop: list[str], tmp_path: Path) -> None:
    # Every rank refuses by itself, so srun must not end the other ones first.
    command = ["srun", "--time=20", "-n2", "--mpi=none", sys.executable, *loop]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert "srun started 2 processes, but the data plane sees 1" in done.stderr
    assert "cluster.mpi=pmi2" in done.stderr


def test_plain_python_inside_salloc_is_one_process(loop: list[str], tmp_path: Path) -> None:
    printed = run(["salloc", "-n4", "--nodes=2", "--time=20", sys.executable, *loop], tmp_path)

    assert positions(printed) == [[0, 1, 2, 3]]


def test_plain_python_in_a_batch_script_is_one_process(loop: list[str], tmp_path: Path) -> None:
    script = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    printed = batch(tmp_path, ["--nodes=2", "--ntasks=4"], script, loop)

    assert positions(printed) == [[0, 1, 2, 3]]
