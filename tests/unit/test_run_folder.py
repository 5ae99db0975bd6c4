"""`RunFolder`: names of runs, and the paths of one."""

from pathlib import Path

import pytest

from mixtera_hpc.config.run_folder import RunFolder, find_runs
from mixtera_hpc.errors import LaunchError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs of two names."""
    for name in ("small/20260101-000000-aaaa", "small/20260102-000000-bbbb", "large/20260103-000000-cccc"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("small", "20260102-000000-bbbb"),
        ("small/20260101-000000-aaaa", "20260101-000000-aaaa"),
        ("20260103-000000-cccc", "20260103-000000-cccc"),
    ],
)
def test_a_run_is_found_by_its_name_or_id(root: Path, name: str, run_id: str) -> None:
    assert RunFolder.find(name, root).run_id == run_id
    assert RunFolder.find(str(root / "large/20260103-000000-cccc"), Path("/nowhere")).name == "large"


def test_an_unknown_run_is_answered_with_similar_names(root: Path) -> None:
    with pytest.raises(LaunchError, match=r"No run 'smal' below .* Did you mean 'small'"):
        RunFolder.find("smal", root)


def test_runs_are_listed_oldest_first(root: Path) -> None:
    assert [run.run_id[:8] for run in find_runs(root)] == ["20260101", "20260102", "20260103"]


def test_attempts_and_checkpoints_are_listed_in_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for attempt in (10, 2):
        run.attempt(attempt).mkdir(parents=True)
    for step in (300, 20, 100_000_000):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".step_00000040.partial").mkdir()

    assert run.attempts() == [2, 10]
    assert run.checkpoint_steps() == [20, 300, 100_000_000]


def test_no_two_paths_of_a_run_are_the_same() -> None:
    run = RunFolder(Path("/runs/name/id"))
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names if name not in ("name", "run_id")]

    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(run.path) for path in paths)
