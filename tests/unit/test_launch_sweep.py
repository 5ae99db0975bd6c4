"""Sweeps: their points, their price, and repeated sweeps."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import compose, load_config
from mixtera_hpc.config.composition.sweep_points import expand
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.launch.attempts import ExitRecord, end_attempt
from mixtera_hpc.launch.resume import amended_config
from mixtera_hpc.launch.sweep.job_array import submit_point, submit_points
from mixtera_hpc.launch.sweep.sweep_plan import plan_sweep

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
    command("scontrol", "echo 'MaxArraySize            = 3'")
    # The number of each job is that of its line in the log.
    return command("sbatch", 'wc -l <"$0.calls"')


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
        ("job.command=[train.py,--name=ü]", ["[train.py,--name=ü]"]),
        ("job.command=[a=1,b],[c=2]", ['["a=1",b]', '["c=2"]']),
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
def test_points_of_one_shape_are_tasks_of_arrays_of_the_size_that_slurm_allows(usual: list[str], slurm: Path) -> None:
    plan = plan_sweep([*usual, "job.nodes=1,2", "dataplane.seed=0,1,2,3"])

    submitted = list(submit_points(plan.due))

    # Two shapes of four points each: an array of three tasks, and a single job.
    assert [job.job_id.partition("_")[2] for job in submitted] == ["0", "1", "2", ""] * 2
    scripts = [Path(line[line.index("/") :]) for line in slurm.read_text().splitlines()]
    assert [script.name for script in scripts] == ["array.sh", "submit.sh"] * 2
    array = scripts[2].read_text()
    assert "#SBATCH --array=0-2\n" in array
    assert "#SBATCH --nodes=2\n" in array
    for number, job in enumerate(submitted[4:7]):
        linked = scripts[2].with_name(f"{number}.sh").resolve()
        assert linked == job.folder.submit_script(1).resolve()
        assert scripts[2].with_name(f"{number}.out").readlink().parts[-4:] == ("attempts", "001", "logs", "batch.out")
    assert {point.action for point in plan_sweep([*usual, "job.nodes=1,2", "dataplane.seed=0,1,2,3"]).points} == {
        "active"
    }


@pytest.mark.slow
def test_the_tasks_of_a_lane_run_one_at_a_time(usual: list[str], slurm: Path) -> None:
    plan = plan_sweep([*usual, "dataplane.seed=0,1,2,3"], max_parallel=2)

    list(submit_points(plan.due))

    arrays = [Path(line[line.index("/") :]).read_text() for line in slurm.read_text().splitlines()]
    for lane, array in enumerate(arrays):
        for line in ("--array=0-1%1", f"--job-name=sweep.lane{lane}", "--dependency=singleton"):
            assert f"#SBATCH {line}\n" in array
    assert len(arrays) == 2


@pytest.mark.slow
def test_an_array_that_slurm_refuses_leaves_nothing(usual: list[str], slurm: Path, command: MakeCommand) -> None:
    command("sbatch", "echo QOSMaxSubmitJob >&2; exit 1")
    sweep = [*usual, "dataplane.seed=0,1,2"]

    with pytest.raises(LaunchError, match="Slurm refused the job"):
        list(submit_points(plan_sweep(sweep).due))

    runs = plan_sweep(sweep).points[0].record.folder
    assert [path.name for path in runs.rglob("*")] == ["sweep.jsonl", "arrays"]
    assert {point.action for point in plan_sweep(sweep).points} == {"new"}


def test_a_weak_sweep_multiplies_the_batch_by_the_nodes(usual: list[str]) -> None:
    plan = plan_sweep([*usual, "sweep=weak", "job.nodes=1,2,4", "dataplane.global_batch_size=6"])

    assert [point.config.dataplane.global_batch_size for point in plan.points] == [6, 12, 24]
    assert {point.config.sweep.batch_per_node for point in plan.points} == {6}
    assert plan.points[2].overrides[-2:] == ("sweep.batch_per_node=6", "dataplane.global_batch_size=24")
    strong = plan_sweep([*usual, "sweep=strong", "job.nodes=1,2,4", "dataplane.global_batch_size=24"])
    assert {point.config.dataplane.global_batch_size for point in strong.points} == {24}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=strong"], "job.nodes has one value, 1"),
        (["sweep=weak", "dataplane.seed=1,2"], "job.nodes has one value, 1"),
        (
            ["sweep=weak", "job.nodes=1,2", "dataplane.batch_schedule=[{start: 0, size: 8}, {start: 2, size: 16}]"],
            "batch_schedule has sizes of its own",
        ),
    ],
)
def test_a_sweep_that_compares_nothing_is_refused(usual: list[str], words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sweep([*usual, *words])


def test_a_weak_batch_outside_of_a_sweep_is_refused(usual: list[str]) -> None:
    with pytest.raises(ConfigError, match="which only mixtera-hpc sweep does"):
        compose([*usual, "sweep=weak"])


@pytest.mark.slow
def test_a_run_of_a_weak_sweep_keeps_its_batch_on_other_nodes(usual: list[str], slurm: Path) -> None:
    [point] = plan_sweep([*usual, "sweep=weak", "job.nodes=1,2", "dataplane.global_batch_size=4"]).points[1:]
    folder = submit_point(point).folder

    resumed = amended_config(folder, ["job.nodes=1"])

    assert (resumed.job.nodes, resumed.dataplane.global_batch_size) == (1, 8)


@pytest.mark.slow
def test_the_record_names_the_runs_of_the_newest_sweep(usual: list[str], slurm: Path) -> None:
    for values in ("0,1", "0,1,2"):
        plan = plan_sweep([*usual, f"dataplane.seed={values}"])
        plan.record()
        plan.record()
        list(submit_points(plan.due))

    record = plan.points[0].record
    sweep = record.newest_sweep()
    assert sweep is not None
    assert (sweep.swept, sweep.num_points, len(set(sweep.runs))) == (("dataplane.seed",), 3, 3)
    assert sum("points" in line for line in record.path.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_finished_sweep_submits_nothing(usual: list[str], slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = [*usual, "sweep=strong", "job.nodes=1,2,4", "dataplane.global_batch_size=8"]
    for submitted in submit_points(plan_sweep(sweep).due):
        end_attempt(submitted.folder, 1, ExitRecord(exit_code=0, elapsed_s=1))

    assert main(["sweep", *sweep]) == 0

    assert "3 of 3 done, nothing to submit." in capsys.readouterr().out
    assert len(slurm.read_text().splitlines()) == 3


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
    command("sbatch", '[ "$(wc -l <"$0.calls")" -le 1 ] && echo 7 || { echo QOSMaxSubmitJob >&2; exit 1; }')

    assert main(["sweep", *usual, "job.nodes=1,2,4"]) == 2

    assert "1 of 3 jobs were submitted; the same command submits the rest" in capsys.readouterr().err
    assert [point.action for point in plan_sweep([*usual, "job.nodes=1,2,4"]).points] == ["active", "new", "new"]


@pytest.mark.slow
def test_an_array_that_cannot_be_written_leaves_every_point_as_it_was(
    usual: list[str], slurm: Path, tmp_path: Path
) -> None:
    """One point is new and one is continued with another time limit, when the folder of the array cannot be made."""
    [first] = plan_sweep([*usual, "dataplane.seed=0"]).due
    known = submit_point(first).folder
    end_attempt(known, 1, ExitRecord(exit_code=75, elapsed_s=1))
    before = {path: path.read_bytes() for path in known.path.rglob("*") if path.is_file()}
    (tmp_path / "runs/sweep/arrays").write_text("not a folder")

    sweep = [*usual, "dataplane.seed=0,1", 'job.time="00:10:00"']
    with pytest.raises(LaunchError, match=r"arrays.*cannot be written"):
        list(submit_points(plan_sweep(sweep).due))

    assert {path: path.read_bytes() for path in known.path.rglob("*") if path.is_file()} == before
    assert [point.action for point in plan_sweep(sweep).points] == ["continue", "new"]
    assert len(list(tmp_path.glob("runs/sweep/*/config.yaml"))) == 1
    assert len(slurm.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_refused_array_leaves_nothing(usual: list[str], slurm: Path, command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", "echo QOSMaxSubmitJob >&2; exit 1")

    with pytest.raises(LaunchError, match="Slurm refused the job"):
        list(submit_points(plan_sweep([*usual, "dataplane.seed=0,1"]).due))

    assert not list(tmp_path.glob("runs/sweep/*/*"))


@pytest.mark.parametrize("seeds", ["0", "0,1"])
def test_a_job_that_slurm_accepted_keeps_its_files(usual: list[str], command: MakeCommand, seeds: str) -> None:
    """Something stands in the place of `job.json`; a task of an array is a job as well."""
    root = next(word for word in usual if word.startswith("run.root=")).partition("=")[2]
    command("scontrol", "echo 'MaxArraySize            = 3'")
    command("sbatch", f'for attempt in "{root}"/sweep/*/attempts/*; do mkdir "$attempt/job.json"; done; echo 17')

    with pytest.raises(LaunchError, match=r"accepted job 17.*could not be recorded"):
        list(submit_points(plan_sweep([*usual, f"dataplane.seed={seeds}"]).due))

    folders = list(Path(root).glob("sweep/*/attempts/*/submit.sh"))
    assert len(folders) == len(seeds.split(","))


@pytest.mark.slow
def test_a_local_sweep_starts_the_program_of_each_point_as_a_batch_script_does(
    usual: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The program saves and stops at its first attempt with seed 1; the repeated sweep continues this run only."""
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    words = [word for word in usual if not word.startswith("job.command")]
    sweep = ["sweep", *words, f"job.command=[{sys.executable},{program}]", "dataplane.seed=0,1", "--local"]
    sweep += ["job.ranks_per_node=1"]

    codes = [main(sweep) for _ in range(2)]

    lines = capfd.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines if line.startswith("exit code")] == [
        *("exit code 0", "exit code 75"),
        "exit code 0",
    ]
    assert codes == [1, 0]
    attempts = [
        len(list(folder.parent.glob("attempts/*/exit.json"))) for folder in tmp_path.glob("runs/*/*/config.yaml")
    ]
    assert sorted(attempts) == [1, 2]


PROGRAM = """
import json, os, pathlib, yaml
folder = pathlib.Path(os.environ["MIXTERA_RUN_FOLDER"])
seed = yaml.safe_load((folder / "config.yaml").read_text())["dataplane"]["seed"]
if seed == 1 and os.environ["MIXTERA_ATTEMPT"] == "1":
    pathlib.Path(os.environ["MIXTERA_SAVED_FILE"]).touch()
"""
"""A program of a user that reads its configuration in the run folder, and may save and stop."""


@pytest.mark.slow
def test_commands_of_the_reference_trainer_refuse_a_run_of_another_program(
    usual: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *usual]) == 2

    assert "mixtera-hpc sweep --local, which start the program" in capsys.readouterr().err
