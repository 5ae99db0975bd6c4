"""The data plane with real MPI ranks: samples, losses and learned weights do not depend on how many there are."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.run_edits import record_run_edit, run_edit_between
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

PROGRAM = Path(__file__).with_name("plane_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LEARNED = [
    "mixture=ado",
    "mixture.group_by=[source]",
    "mixture.algorithm={name:ado,warmup:6,refit_interval:6}",
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=24",
    "dataplane.chunk_steps=3",
    "dataplane.audit=true",
]
STEPS = 30

Serve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def overrides(collection: list[str]) -> list[str]:
    return [*(o for o in collection if not o.startswith("mixture.group_by")), *LEARNED]


@pytest.fixture(scope="module")
def serve(overrides: list[str]) -> Serve:
    def launch(
        folder: Path,
        ranks: int,
        attempt: int = 1,
        steps: int = STEPS,
        more: tuple[str, ...] = (),
        torchrun: bool = False,
    ) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        launcher = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py"]
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words = [PROGRAM, folder, str(attempt), str(steps), *overrides, *more]
        done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return launch


@pytest.fixture(scope="module")
def alone(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, serve(folder, 1)


def weights(folder: Path) -> list[list[int]]:
    """Return the weights of every chunk, from the attempt that counts."""
    history = History(RunFolder(folder).journal)
    return [history.plan_of(step).weights.tolist() for step in range(0, STEPS, 3)]


def consumed(folder: Path) -> dict[tuple[int, int], str]:
    """Return (step, position) → digest, from the attempt that counts."""
    run = RunFolder(folder)
    history = History(run.journal)
    digests = {}
    for attempt in history.attempts:
        for path in run.audit(attempt.number).glob("*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                if history.attempt_of(line["step"]).number == attempt.number:
                    digests |= {(line["step"], p): d for p, d in zip(line["positions"], line["digests"], strict=True)}
    return digests


def test_the_mixture_changes_while_training(alone: tuple[Path, dict[str, Any]]) -> None:
    """Otherwise the other tests would compare constants."""
    first, *_, last = weights(alone[0])
    assert first != last


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.full), 3, pytest.param(4, marks=pytest.mark.full), 8]
)
def test_served_samples_and_learned_weights_do_not_depend_on_the_number_of_ranks(
    ranks: int, serve: Serve, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = alone
    assert serve(tmp_path / "run", ranks) == expected
    assert weights(tmp_path / "run") == weights(folder)
    assert consumed(tmp_path / "run") == consumed(folder)


def test_a_restart_under_another_launcher_changes_nothing(
    serve: Serve, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = alone
    first_part = serve(tmp_path / "run", 2, 1, 13, torchrun=True)
    second_part = serve(tmp_path / "run", 3, 2)
    assert first_part["statistics"] + second_part["statistics"] == expected["statistics"]
    assert weights(tmp_path / "run") == weights(folder)
    assert consumed(tmp_path / "run") == consumed(folder)


@pytest.mark.parametrize(
    ("first", "second", "stop"),
    [(4, 2, 13), pytest.param(2, 3, 15, marks=pytest.mark.full), pytest.param(1, 4, 2, marks=pytest.mark.full)],
)
def test_a_restart_with_another_number_of_ranks_changes_nothing_and_verifies(
    first: int,
    second: int,
    stop: int,
    serve: Serve,
    alone: tuple[Path, dict[str, Any]],
    overrides: list[str],
    tmp_path: Path,
) -> None:
    folder, expected = alone
    first_part = serve(tmp_path / "run", first, 1, stop)
    second_part = serve(tmp_path / "run", second, 2)
    assert first_part["next_step"] == stop
    assert first_part["statistics"] + second_part["statistics"] == expected["statistics"]
    assert weights(tmp_path / "run") == weights(folder)
    assert consumed(tmp_path / "run") == consumed(folder)
    run = RunFolder(tmp_path / "run")
    verdict = verify_run(ServedRun(run, compose(overrides)))
    assert (verdict.num_steps, verdict.num_sequences, verdict.num_attempts) == (STEPS, 24 * STEPS, 2)


def test_ranks_of_a_model_parallel_group_get_the_same_and_are_counted_once(
    serve: Serve, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert serve(tmp_path / "run", 4, more=("dataplane.model_parallel_size=2",)) == alone[1]
    assert consumed(tmp_path / "run") == consumed(alone[0])


def test_a_stop_requested_of_one_rank_stops_all_at_the_same_step(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "run" / "control").mkdir(parents=True)
    (tmp_path / "run" / "control" / "stop").touch()
    assert serve(tmp_path / "run", 3)["next_step"] == 2


def test_a_batch_that_ranks_cannot_share_is_refused(serve: Serve, overrides: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mpi4py", PROGRAM, tmp_path / "run", "1", "5", *overrides]
    done = subprocess.run([MPIEXEC, "-n", "5", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "cannot be shared evenly by 5 ranks" in done.stderr


@pytest.mark.full
def test_an_edit_between_attempts_of_different_ranks_is_proven(
    serve: Serve, overrides: list[str], tmp_path: Path
) -> None:
    """Data steps 12 to 16 are skipped and the batch grows. One rank and three ranks serve the same afterwards."""
    before = compose(overrides)
    after = compose([*overrides, "dataplane.global_batch_size=30"])
    for name, ranks in (("one", 1), ("many", 3)):
        folder = tmp_path / name
        serve(folder, 2, 1, 10)
        edit = run_edit_between(before, after, [], at_step=10, skip_steps=(12, 16))
        assert edit is not None
        record_run_edit(RunFolder(folder).decisions, edit)
        serve(folder, ranks, 2, 24, more=("dataplane.global_batch_size=30",))
    assert consumed(tmp_path / "one") == consumed(tmp_path / "many")
    run = RunFolder(tmp_path / "many")
    verdict = verify_run(ServedRun(run, after))
    assert (verdict.num_steps, verdict.num_sequences) == (24, 10 * 24 + 14 * 30)
