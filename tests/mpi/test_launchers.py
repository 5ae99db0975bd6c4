"""Every launcher with every communicator and a user's own loop: it works, or exits with 2 and names the cure."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("launcher_program.py")
MPIEXEC = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ANY_PORT = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]
FAILURE_LIMIT_S = 20

NO_GROUP = "Call init_process_group (or create the Accelerator) first"
TOO_FEW = "started 2 processes, but the data plane sees 1"
BY_TORCHRUN = "torchrun started this process"

Row = dict[str, Any]


def launch(command: list[str], env: dict[str, str] | None = None, limit_s: float = 900) -> Any:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, **(env or {})}, check=False
    )


def own_loop(mode: str, overrides: list[str]) -> list[str]:
    return [str(PROGRAM), mode, *overrides, *SMALL]


def positions(output: str) -> list[list[int]]:
    return sorted(json.loads(line)["positions"] for line in output.splitlines() if "positions" in line)


def table_of(command: list[str], env: dict[str, str] | None = None) -> dict[str, list[Row]]:
    """Return name of the row → what became of it on each rank."""
    done = launch(command, env)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = defaultdict(list)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            rows[entry.pop("row")].append(entry)
    return rows


@pytest.fixture(scope="module")
def under_torchrun(collection: list[str]) -> dict[str, list[Row]]:
    return table_of([*TORCHRUN, *own_loop("table", collection)])


@pytest.fixture(scope="module")
def under_mpiexec(collection: list[str]) -> dict[str, list[Row]]:
    return table_of([*MPIEXEC, sys.executable, *own_loop("table", collection)])


@pytest.fixture(scope="module")
def under_srun_without_mpi(collection: list[str]) -> dict[str, list[Row]]:
    """One of two tasks of an srun step whose MPI plugin does not fit: MPI sees one process."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    return table_of([sys.executable, *own_loop("table", collection)], step)


@pytest.fixture(scope="module")
def under_salloc(collection: list[str]) -> dict[str, list[Row]]:
    """A plain `python` inside `salloc -n 4`."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}
    return table_of([sys.executable, *own_loop("table", collection)], allocation)


def assert_shared(rows: list[Row]) -> None:
    assert sorted(row["positions"] for row in rows) == [[0, 1], [2, 3]], rows


def assert_alone(rows: list[Row]) -> None:
    assert {tuple(row["positions"]) for row in rows} == {(0, 1, 2, 3)}, rows


def assert_refused(rows: list[Row], *messages: str) -> None:
    for row in rows:
        assert row["code"] == 2
        assert row["message"].count("LaunchError") == 1
        for message in messages:
            assert message in row["message"]
    assert rows


@pytest.mark.parametrize("name", ["auto with group", "torch with group", "WORLD"])
def test_torchrun_ranks_share_a_batch_through_the_process_group(
    name: str, under_torchrun: dict[str, list[Row]]
) -> None:
    assert_shared(under_torchrun[name])


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("auto", [NO_GROUP]),
        ("torch", [NO_GROUP]),
        ("mpi", [BY_TORCHRUN, "dataplane.comm=auto"]),
        ("mpi with group", [BY_TORCHRUN, "dataplane.comm=auto"]),
        ("local", [TOO_FEW, "dataplane.comm=auto"]),
        ("local with group", [TOO_FEW, "dataplane.comm=auto"]),
        ("COMM_WORLD", [TOO_FEW, "Give DataPlane.open no MPI communicator"]),
        ("part", [TOO_FEW, "process group of all 2 processes"]),
    ],
)
def test_torchrun_ranks_that_would_train_alone_are_refused(
    name: str, messages: list[str], under_torchrun: dict[str, list[Row]]
) -> None:
    assert len(under_torchrun[name]) == 2
    assert_refused(under_torchrun[name], *messages)


@pytest.mark.parametrize("name", ["COMM_SELF subset", "part subset"])
def test_a_deliberate_subset_of_the_torchrun_ranks_is_accepted(name: str, under_torchrun: dict[str, list[Row]]) -> None:
    assert_alone(under_torchrun[name])


@pytest.mark.parametrize("name", ["auto", "mpi", "COMM_WORLD"])
def test_mpiexec_ranks_share_a_batch(name: str, under_mpiexec: dict[str, list[Row]]) -> None:
    assert_shared(under_mpiexec[name])


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("local", [TOO_FEW, "Set dataplane.comm=auto"]),
        ("torch", ["There is no torch process group", NO_GROUP]),
        ("COMM_SELF", [TOO_FEW, "Give DataPlane.open MPI.COMM_WORLD", "subset=True"]),
    ],
)
def test_mpiexec_ranks_that_would_train_alone_are_refused(
    name: str, messages: list[str], under_mpiexec: dict[str, list[Row]]
) -> None:
    assert_refused(under_mpiexec[name], *messages)


def test_a_deliberate_subset_of_the_mpiexec_ranks_is_accepted(under_mpiexec: dict[str, list[Row]]) -> None:
    assert_alone(under_mpiexec["COMM_SELF subset"])


@pytest.mark.parametrize("name", ["auto", "mpi", "COMM_WORLD"])
def test_srun_tasks_whose_mpi_does_not_fit_are_refused(name: str, under_srun_without_mpi: dict[str, list[Row]]) -> None:
    assert_refused(under_srun_without_mpi[name], TOO_FEW, "srun --mpi")


@pytest.mark.parametrize("name", ["auto", "local", "mpi", "COMM_WORLD"])
def test_plain_python_inside_salloc_is_one_process(name: str, under_salloc: dict[str, list[Row]]) -> None:
    assert_alone(under_salloc[name])


def test_a_process_alone_has_no_process_group(under_salloc: dict[str, list[Row]]) -> None:
    assert_refused(under_salloc["torch"], "There is no torch process group", "dataplane.comm=auto")


def test_torchrun_inside_a_step_of_srun_is_the_innermost_launcher(collection: list[str]) -> None:
    """`srun -n1 torchrun`: the variables of Slurm and of its process manager are inherited."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    manager = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "99"}
    done = launch([*TORCHRUN, *own_loop("loop", collection)], {**step, **manager})

    assert done.returncode == 0, done.stderr[-4000:]
    assert positions(done.stdout) == [[0, 1], [2, 3]]


def test_two_torchruns_under_mpiexec_are_two_jobs(collection: list[str]) -> None:
    """MPI must not start there: it would crash with the variables of the outer mpiexec."""
    done = launch([*MPIEXEC, *TORCHRUN, *ANY_PORT, *own_loop("loop", collection)])

    assert done.returncode == 0, done.stderr[-4000:]
    assert positions(done.stdout) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_every_rank_of_torchrun_with_a_local_communicator_exits_with_2(collection: list[str]) -> None:
    done = launch([*TORCHRUN, *own_loop("loop", collection), "dataplane.comm=local"])

    assert done.returncode == 1
    assert done.stdout == ""
    for rank in range(2):
        assert done.stderr.count(f"[rank {rank} on") == 1
    assert done.stderr.count("exitcode  : 2 ") == 2


def test_mpiexec_with_a_local_communicator_exits_with_2(collection: list[str]) -> None:
    done = launch([*MPIEXEC, sys.executable, *own_loop("loop", collection), "dataplane.comm=local"])

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_an_exception_in_one_rank_ends_all_and_names_it(launcher: str, collection: list[str], tmp_path: Path) -> None:
    commands = {"mpiexec": [*MPIEXEC, sys.executable], "torchrun": TORCHRUN}
    failed_at = tmp_path / "failed_at"
    done = launch([*commands[launcher], *own_loop("fail", collection)], {"FAILED_AT": str(failed_at)})

    assert done.returncode != 0
    assert time.time() - float(failed_at.read_text()) < FAILURE_LIMIT_S
    assert "[rank 1 on" in done.stderr
    assert "ValueError: broken on purpose" in done.stderr


@pytest.mark.parametrize("launcher", ["mpiexec", pytest.param("torchrun", marks=pytest.mark.full)])
def test_an_error_in_held_out_samples_of_one_rank_ends_all_and_names_it(launcher: str, collection: list[str]) -> None:
    """The other ranks are inside a collective, and the watchdog does not end them."""
    commands = {"mpiexec": [*MPIEXEC, sys.executable], "torchrun": TORCHRUN}
    words = ["mixture.unit=samples", "dataplane.tokenizer=null", "data.transform=broken_transform.fail_on_rank_1"]
    words += ["query.holdout.fraction=0.3", "training.validate_steps=3", "dataplane.watchdog_s=600"]
    done = launch([*commands[launcher], *own_loop("validate", [*collection, *words])])

    assert done.returncode != 0
    assert "[rank 1 on" in done.stderr
    assert "DataError: data.transform=broken_transform.fail_on_rank_1 failed for " in done.stderr


def test_an_error_that_only_rank_0_sees_while_opening_ends_all(collection: list[str], tmp_path: Path) -> None:
    """Only rank 0 reads the index; the other ranks wait for it."""
    overrides = [*collection, f"index.path={tmp_path / 'missing.h5'}"]
    done = launch([*MPIEXEC, sys.executable, *own_loop("loop", overrides)])

    assert done.returncode == 2, done.stderr
    assert "[rank 0 on" in done.stderr
    assert "PropertyIndexError" in done.stderr


@pytest.mark.parametrize(
    "program",
    [["--no-python", "mixtera-hpc", "run"], pytest.param(["-m", "mixtera_hpc.training"], marks=pytest.mark.full)],
)
def test_the_reference_trainer_creates_the_group_under_torchrun(
    program: list[str], collection: list[str], tmp_path: Path
) -> None:
    small = ["training.num_steps=2", "training.num_layers=1", "training.num_heads=2", "training.embedding_dim=16"]
    places = [f"run.root={tmp_path}", "run.name=small"]
    if "-m" in program:
        places.append(f"hydra.run.dir={tmp_path / 'hydra'}")
    else:
        program = ["--no-python", str(Path(sys.executable).with_name("mixtera-hpc")), "run"]
    done = launch([*TORCHRUN, *program, *collection, *SMALL, *small, *places, "training.device=cpu"])

    assert done.returncode == 0, done.stderr[-4000:]
    (run,) = (tmp_path / "small").iterdir()
    attempts = [json.loads(line) for line in (run / "metrics/attempts.jsonl").read_text().splitlines()]
    assert [attempt["num_ranks"] for attempt in attempts] == [2]
