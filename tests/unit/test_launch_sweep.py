"""Sweeps: their points, their price, and repeated sweeps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.sweep import expand
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.attempts import ExitRecord, end_attempt
from mixtera_hpc.launch.sweep import plan_sweep, submit_point

MakeCommand = Callable[[str, str], Path]


@pytest.fixture
def usual(tmp_path: Path) -> list[str]:
    return [
        "cluster=dev",
        "data.root=/data",
        "mixture.unit=samples",
        f"run.root={tmp_path}/runs",
        "run.name=sweep",
        "job.command=[echo]",
    ]


@pytest.fixture
def slurm(command: MakeCommand) -> Path:
    """Install a Slurm that accepts every job and knows none afterwards; return the log of sbatch calls."""
    command("squeue", "echo 'Invalid job id specified' >&2; exit 1")
    command("sacct", "exit 0")
    return command("sbatch", "echo $RANDOM")


def test_lists_and_ranges_give_all_combinations() -> None:
    points = expand(["a=1", "b=1,2", "c=range(0,2)", "d='x,y'", "e=[1,2]"])

    assert len(points) == 4
    assert points[0] == ["a=1", "b=1", "c=0", "d='x,y'", "e=[1,2]"]
    assert points[-1] == ["a=1", "b=2", "c=1", "d='x,y'", "e=[1,2]"]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("job.time=01:00:00,1-02:00:00", ["01:00:00", "1-02:00:00"]),
        ("query.where=q >= 0.3 and l in ['en', 'de']", ["q >= 0.3 and l in ['en', 'de']"]),
        ("query.where='a == 1',\"b == 'x'\"", ["'a == 1'", "\"b == 'x'\""]),
    ],
)
def test_commas_inside_text_do_not_separate_values(override: str, values: list[str]) -> None:
    assert expand([override]) == [[f"{override.partition('=')[0]}={value}"] for value in values]


@pytest.mark.parametrize("override", ["experiment=glob(*)", "a=interval(0,1)", "not an override"])
def test_an_override_without_a_list_of_values_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        expand([override])


def test_points_may_differ_in_nodes(usual: list[str]) -> None:
    plan = plan_sweep([*usual, "job.nodes=1,2,4", 'job.time="00:30:00"', "job.max_attempts=2"])

    assert [point.config.job.nodes for point in plan.points] == [1, 2, 4]
    assert plan.node_hours == (1 + 2 + 4) * 0.5 * 2


def test_a_bad_point_is_refused_before_anything_is_submitted(usual: list[str]) -> None:
    with pytest.raises(ConfigError, match="at most 4"):
        plan_sweep([*usual, "job.nodes=1,16"])


def test_lanes_limit_how_many_jobs_run_at_a_time(usual: list[str]) -> None:
    plan = plan_sweep([*usual, "dataplane.seed=0,1,2,3"], max_parallel=2)

    assert [point.config.job.name for point in plan.points] == ["sweep.lane0", "sweep.lane1"] * 2
    assert {point.config.job.dependency for point in plan.points} == {"singleton"}


@pytest.mark.slow
def test_a_repeated_sweep_skips_finished_points_and_continues_others(usual: list[str], slurm: Path) -> None:
    sweep = [*usual, "dataplane.seed=0,1,2"]
    folders = [submit_point(point).folder for point in plan_sweep(sweep).due]
    end_attempt(folders[0], 1, ExitRecord(exit_code=0, elapsed_s=1))
    end_attempt(folders[1], 1, ExitRecord(exit_code=75, elapsed_s=1))

    plan = plan_sweep([*sweep, 'job.time="00:10:00"'])

    assert [point.action for point in plan.points] == ["finished", "continue", "active"]
    again = submit_point(plan.due[0])
    assert (again.folder, again.attempt) == (folders[1], 2)
    assert load_config(folders[1].config).job.time == "00:10:00"
    assert len(slurm.read_text().splitlines()) == 4


@pytest.mark.slow
def test_more_points_of_a_sweep_are_new(usual: list[str], slurm: Path) -> None:
    for point in plan_sweep([*usual, "dataplane.seed=0"]).due:
        end_attempt(submit_point(point).folder, 1, ExitRecord(exit_code=0, elapsed_s=1))

    actions = [point.action for point in plan_sweep([*usual, "dataplane.seed=0,1", "job.nodes=1,2"]).points]

    assert actions == ["finished", "new", "new", "new"]


@pytest.mark.slow
def test_an_expensive_sweep_needs_confirmation(
    usual: list[str], slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line = ["sweep", *usual, "job.nodes=2,4", 'job.time="24:00:00"', "--ask-above", "100"]

    assert main(command_line) == 2

    output = capsys.readouterr()
    assert "144 node-hours with one job per run, at most 1440" in output.out
    assert "--yes" in output.err
    assert not slurm.exists()
    assert main([*command_line, "--yes"]) == 0
    assert len(slurm.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_refusal_by_slurm_names_how_many_jobs_were_submitted(
    usual: list[str], slurm: Path, command: MakeCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    command("sbatch", f'[ "$(wc -l <{slurm})" -le 1 ] && echo 7 || {{ echo QOSMaxSubmitJob >&2; exit 1; }}')

    assert main(["sweep", *usual, "dataplane.seed=0,1,2"]) == 2

    assert "1 of 3 jobs were submitted; the same command submits the rest" in capsys.readouterr().err
    assert [point.action for point in plan_sweep([*usual, "dataplane.seed=0,1,2"]).points] == ["active", "new", "new"]
