"""The batch script: its sbatch parameters, shell quoting of any text, and its own shell code."""

import json
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script

MakeConfig = Callable[..., Config]
MakeCommand = Callable[[str, str], Path]


def flags(script: str) -> dict[str, str | None]:
    """Return the `#SBATCH` parameters of a script."""
    words = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {word.partition("=")[0]: word.partition("=")[2] or None for word in words}


def srun_line(script: str) -> str:
    lines = script.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("srun"))
    return " ".join(lines[start : start + 2])


def test_the_same_input_gives_the_same_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    texts = {render_script(SbatchJob(config=make_config("cluster=dev"), folder=tmp_path)) for _ in range(2)}

    assert len(texts) == 1


def test_resources_are_requested_and_repeated_on_srun(make_config: MakeConfig, tmp_path: Path) -> None:
    script = render_script(SbatchJob(config=make_config("cluster=dev", "job.nodes=4"), folder=tmp_path))

    asked = flags(script)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("4", "2", "4")
    assert asked["signal"] == "USR2@120"
    assert "no-requeue" in asked
    assert "wckey" not in asked
    for word in ("--kill-on-bad-exit=1", "--mpi=pmi2", "--cpus-per-task=4"):
        assert word in srun_line(script)


def test_job_keys_win_over_cluster_keys(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cluster=perlmutter", "job.qos=debug", "dataplane.global_batch_size=64")

    asked = flags(render_script(SbatchJob(config=config, folder=tmp_path)))

    assert (asked["qos"], asked["constraint"]) == ("debug", "gpu")


def test_a_cluster_can_remove_a_default_parameter(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cluster=dev", "+cluster.sbatch.no-requeue=null", "+cluster.sbatch.requeue=true")

    asked = flags(render_script(SbatchJob(config=config, folder=tmp_path)))

    assert "requeue" in asked
    assert "no-requeue" not in asked


@pytest.mark.parametrize(
    ("request_kind", "name", "value"),
    [("gpus-per-task", "gpus-per-task", "1"), ("gpus-per-node", "gpus-per-node", "4"), ("gres", "gres", "gpu:4")],
)
def test_gpus_are_requested_with_the_parameter_of_the_cluster(
    make_config: MakeConfig, tmp_path: Path, request_kind: str, name: str, value: str
) -> None:
    config = make_config("cluster=dev", "cluster.gpus_per_node=4", f"cluster.gpu_request={request_kind}")

    assert flags(render_script(SbatchJob(config=config, folder=tmp_path)))[name] == value


def test_many_ranks_share_one_labelled_log_per_node(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cluster=clariden", "job.nodes=64", "dataplane.global_batch_size=256")

    assert '--label --output="$logs/node_%05n.out"' in srun_line(
        render_script(SbatchJob(config=config, folder=tmp_path))
    )


def test_a_container_is_passed_to_srun_only(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cluster=clariden", "environment=container", "environment.image=/x/mixtera.toml")

    script = render_script(SbatchJob(config=config, folder=tmp_path))

    assert "--environment=/x/mixtera.toml" in srun_line(script)
    assert "environment" not in flags(script)
    assert "numactl --membind=0-3 python -u -m mixtera_hpc run" in srun_line(script)


def test_a_uenv_and_its_view_are_passed_to_srun_with_the_python_inside(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cluster=alps_daint", "environment=uenv", "environment.image=pytorch/v2.9.1:v2")

    line = srun_line(render_script(SbatchJob(config=config, folder=tmp_path)))

    assert "--uenv=pytorch/v2.9.1:v2 --view=default" in line
    assert " python -u -m mixtera_hpc run" in line
    assert "--mpi" not in line


def test_the_environment_chooses_the_mpi_plugin(make_config: MakeConfig, tmp_path: Path) -> None:
    container = ["environment=container", "environment.image=/x/mixtera.toml"]
    lines = [
        srun_line(render_script(SbatchJob(config=make_config(*words), folder=tmp_path)))
        for words in (
            ["cluster=clariden", *container],
            ["cluster=clariden", *container, "environment.mpi=pmi2"],
            ["cluster=dev", "environment.mpi=pmix"],
        )
    ]

    assert [word for line in lines for word in line.split() if word.startswith("--mpi")] == [
        *("--mpi=pmix", "--mpi=pmi2", "--mpi=pmix")
    ]


@pytest.mark.parametrize(
    ("overrides", "signal"),
    [
        (["cluster=clariden", "job.time=12:00:00"], "USR2@600"),
        (["cluster=clariden", "job.time=00:10:00"], "USR2@200"),
        (["cluster=clariden", "job.signal_lead_s=60"], "USR2@60"),
        (["cluster=dev", "job.time=01:00:00"], "USR2@120"),
    ],
)
def test_the_signal_comes_as_early_as_the_site_asks_for_but_not_before_two_thirds(
    make_config: MakeConfig, tmp_path: Path, overrides: list[str], signal: str
) -> None:
    script = render_script(SbatchJob(config=make_config(*overrides), folder=tmp_path))

    assert flags(script)["signal"] == signal


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment=venv"], "environment=venv needs environment.venv"),
        (["cluster=clariden", "environment=container"], "environment=container needs environment.image"),
        (["environment.image=/x"], "environment=none has none"),
        (["environment.view=default"], "only a uenv has views"),
        (["environment=uenv", "environment.image=a"], "cluster 'local' has no cluster.uenv_flag"),
    ],
)
def test_an_environment_that_cannot_start_is_refused(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


UNSAFE_TEXT = "a b'c\"d$(touch pwned)`touch pwned`;touch pwned"


def test_all_user_text_is_quoted_for_the_shell(make_config: MakeConfig, command: MakeCommand, tmp_path: Path) -> None:
    folder = tmp_path / f"{UNSAFE_TEXT.replace('/', '')} 100%"
    config = make_config("cluster=dev", "job.command=[hello]", "+cluster.env={SAID: placeholder}")
    config = with_text(config)
    calls = command("srun", f'echo "$SAID" >"{tmp_path}/said"')
    script = tmp_path / "script.sh"
    script.write_text(render_script(SbatchJob(config=config, folder=folder)))

    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, env=job_environment())

    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("pwned"))
    assert (tmp_path / "said").read_text() == UNSAFE_TEXT + "\n"
    assert UNSAFE_TEXT in calls.read_text()
    assert (folder / "attempts/001/exit.json").exists()


def with_text(config: Config) -> Config:
    job = replace(config.job, command=["hello", UNSAFE_TEXT], srun_args=[UNSAFE_TEXT], comment=UNSAFE_TEXT)
    return replace(config, job=job, cluster=replace(config.cluster, env={"SAID": UNSAFE_TEXT}))


def job_environment() -> dict[str, str]:
    return {**os.environ, "SLURM_JOB_ID": "4711"}


@pytest.fixture
def attempt(
    make_config: MakeConfig, command: MakeCommand, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the first of up to three attempts with an srun whose body is given."""
    command("sbatch", 'echo "4712;lab"')
    command("scancel", "exit 0")
    folder = tmp_path / "run"

    def run(srun: str, *overrides: str, words: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        config = make_config("cluster=dev", "job.max_attempts=3", *overrides)
        command("srun", srun)
        script = tmp_path / "script.sh"
        script.write_text(render_script(SbatchJob(config=config, folder=folder)))
        start = ["bash", str(script), *words]
        return subprocess.run(start, capture_output=True, text=True, env=job_environment())

    return run


Attempt = Callable[..., subprocess.CompletedProcess[str]]
SAVE = 'mkdir -p "$MIXTERA_RUN_FOLDER/checkpoints"; echo step_00000007 >"$MIXTERA_RUN_FOLDER/checkpoints/LATEST"; '


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_the_exit_code_of_srun_is_the_exit_code_of_the_job(attempt: Attempt, tmp_path: Path, code: int) -> None:
    done = attempt(f"exit {code}")

    assert done.returncode == code
    assert json.loads((tmp_path / "run/attempts/001/exit.json").read_text())["exit_code"] == code


FOLLOW_UP = "run/attempts/001/follow_up"


@pytest.mark.parametrize("leave", ["exit 75", 'touch "$MIXTERA_SAVED_FILE"', "exit 1", "exit 137", "exit 143"])
def test_a_job_waits_for_the_end_of_an_attempt(attempt: Attempt, tmp_path: Path, leave: str) -> None:
    done = attempt(SAVE + leave)

    assert done.returncode not in (0, 2)
    call = (tmp_path / "bin/sbatch.calls").read_text()
    folder = tmp_path / "run"
    assert "--dependency=afternotok:4711 --kill-on-invalid-dep=yes" in call
    assert call.strip().endswith(f"{folder}/attempts/001/submit.sh 2 {folder} 4711")
    assert (tmp_path / FOLLOW_UP).read_text() == "4712\n"
    assert not (tmp_path / "bin/scancel.calls").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_the_waiting_job_is_withdrawn_if_nothing_is_left_to_do(attempt: Attempt, tmp_path: Path, code: int) -> None:
    assert attempt(SAVE + f"exit {code}").returncode == code

    assert "4712" in (tmp_path / "bin/scancel.calls").read_text()
    assert not (tmp_path / FOLLOW_UP).exists()


def test_a_rank_that_fails_after_others_saved_is_a_failure(attempt: Attempt) -> None:
    assert attempt(SAVE + 'touch "$MIXTERA_SAVED_FILE"; exit 9').returncode == 9


def test_two_attempts_without_a_new_checkpoint_end_the_chain(attempt: Attempt, tmp_path: Path) -> None:
    first = attempt("exit 75")
    assert "Attempt 2 is job 4712" in first.stdout

    second = attempt("exit 1", words=follow_up_words(tmp_path))

    assert second.returncode == 1
    log = (tmp_path / "run/attempts/002/logs/batch.out").read_text()
    assert "Two attempts in a row made no new checkpoint" in log
    assert "4712" in (tmp_path / "bin/scancel.calls").read_text()


def follow_up_words(tmp_path: Path) -> list[str]:
    """Return the arguments of the job that follows the first attempt."""
    return ["2", str(tmp_path / "run"), "4710"]


def test_an_attempt_with_a_new_checkpoint_goes_on_after_one_without(attempt: Attempt, tmp_path: Path) -> None:
    attempt("exit 75")

    attempt(SAVE + "exit 1", words=follow_up_words(tmp_path))

    assert (tmp_path / "run/attempts/002/follow_up").exists()


def test_no_more_than_max_attempts_are_submitted(attempt: Attempt, tmp_path: Path) -> None:
    done = attempt(SAVE + "exit 75", "job.max_attempts=1")

    assert done.returncode == 75
    assert "mixtera-hpc resume" in done.stdout
    assert not (tmp_path / "bin/sbatch.calls").exists()


def test_an_attempt_of_a_cancelled_run_withdraws_the_next(attempt: Attempt, tmp_path: Path) -> None:
    done = attempt(SAVE + 'touch "$MIXTERA_RUN_FOLDER/control/cancelled"; exit 75')

    assert done.returncode == 75
    assert not (tmp_path / FOLLOW_UP).exists()


def test_a_follow_up_job_of_a_cancelled_run_does_not_train(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "run/control").mkdir(parents=True)
    (tmp_path / "run/control/cancelled").touch()

    assert attempt("exit 0").returncode == 75
    assert not (tmp_path / "bin/srun.calls").exists()


def test_nothing_follows_a_job_that_a_user_cancelled(attempt: Attempt, command: MakeCommand, tmp_path: Path) -> None:
    command("sacct", "echo 'CANCELLED by 1000'")

    done = attempt("exit 0", words=follow_up_words(tmp_path))

    assert done.returncode == 0
    assert "Job 4710 was cancelled" in done.stdout
    assert not (tmp_path / "bin/srun.calls").exists()
    assert not (tmp_path / "run/attempts").exists()


def test_a_script_whose_attempt_is_running_is_refused(attempt: Attempt, command: MakeCommand, tmp_path: Path) -> None:
    here = tmp_path / "run/attempts/001"
    here.mkdir(parents=True)
    (here / "claim").write_text("17 0 nid7\n")
    # The other job counts while this one looks.
    command("sleep", f'echo one more >>"{here}/alive"')

    done = attempt("exit 0")

    assert done.returncode == 2
    assert "is running as job 17, and a run has one writer" in done.stdout
    assert not (tmp_path / "bin/srun.calls").exists()


def test_a_script_whose_attempt_was_killed_begins_the_next(
    attempt: Attempt, command: MakeCommand, tmp_path: Path
) -> None:
    here = tmp_path / "run/attempts/001"
    here.mkdir(parents=True)
    (here / "claim").write_text("17 0 nid7\n")
    command("sleep", "exit 0")

    assert attempt(SAVE + "exit 0").returncode == 0

    assert "--attempt 2" in (tmp_path / "bin/srun.calls").read_text()
    assert json.loads((tmp_path / "run/attempts/002/job.json").read_text())["job_id"] == "4711"


def test_the_script_of_a_complete_run_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    attempt(SAVE + "exit 0")
    (tmp_path / "bin/srun.calls").unlink()

    done = attempt("exit 0")

    assert done.returncode == 2
    assert "The run is complete" in done.stdout
    assert not (tmp_path / "bin/srun.calls").exists()
    assert not (tmp_path / "run/attempts/002").exists()


def test_the_log_names_the_command_to_continue_if_sbatch_fails(attempt: Attempt, command: MakeCommand) -> None:
    command("sbatch", "echo refused >&2; exit 1")
    command("squeue", "exit 0")
    command("sleep", "exit 0")

    done = attempt(SAVE + "exit 75")

    assert done.returncode == 75
    assert "mixtera-hpc resume" in done.stdout


def test_a_job_that_sbatch_reports_as_failed_is_found_in_the_queue(
    attempt: Attempt, command: MakeCommand, tmp_path: Path
) -> None:
    calls = command("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    script = tmp_path / "run/attempts/001/submit.sh"
    command("squeue", f"echo '4711|{script}'; echo '4713|{script}'")

    attempt(SAVE + "exit 75")

    assert len(calls.read_text().splitlines()) == 1
    assert (tmp_path / FOLLOW_UP).read_text() == "4713\n"


def test_a_transient_error_of_sbatch_is_tried_again(attempt: Attempt, command: MakeCommand, tmp_path: Path) -> None:
    calls = command("sbatch", f'[ -e "{tmp_path}/second" ] && echo 4712 && exit 0; touch "{tmp_path}/second"; exit 1')
    command("squeue", "exit 0")
    command("sleep", "exit 0")

    attempt(SAVE + "exit 75")

    assert len(calls.read_text().splitlines()) == 2
    assert (tmp_path / FOLLOW_UP).read_text() == "4712\n"


def test_follow_up_jobs_of_a_sweep_lane_use_singleton(attempt: Attempt, tmp_path: Path) -> None:
    attempt(SAVE + "exit 75", "job.dependency=singleton")

    assert "--dependency=singleton,afternotok:4711" in (tmp_path / "bin/sbatch.calls").read_text()


def test_the_first_failing_rank_is_named_in_the_batch_log(attempt: Attempt) -> None:
    done = attempt('echo "{\\"rank\\": 2}" >"$MIXTERA_RUN_FOLDER/attempts/001/failure.json"; exit 1')

    assert 'First failure: {"rank": 2}' in done.stdout


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_shared_memory_of_killed_ranks_is_removed_and_that_of_others_stays(attempt: Attempt) -> None:
    dead = Path("/dev/shm") / f"mixtera-{os.getpid()}-dead"
    used = Path("/dev/shm") / f"mixtera-{os.getpid()}-used"
    new = Path("/dev/shm") / f"mixtera-{os.getpid()}-new"
    try:
        # However long the script takes, one file is old and another one is new.
        for path, age_s in ((dead, 60), (used, 60), (new, -600)):
            path.write_bytes(b"1")
            os.utime(path, (time.time() - age_s,) * 2)
        with used.open("rb") as file, mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ):
            attempt("exit 137")

            assert (dead.exists(), used.exists()) == (False, True)
            assert new.exists(), "another job may be about to map it"
    finally:
        dead.unlink(missing_ok=True)
        used.unlink(missing_ok=True)
        new.unlink(missing_ok=True)


def test_a_script_without_a_folder_makes_one(make_config: MakeConfig, command: MakeCommand, tmp_path: Path) -> None:
    config = make_config("cluster=dev")
    command("srun", "exit 0")
    script = render_script(SbatchJob(config=config, overrides=["cluster=dev", "data.root=it's here"]))

    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=job_environment())

    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs/trial").iterdir()
    assert folder.name.endswith("-4711")
    assert load_config(folder / "config.yaml") == config
    assert (folder / "overrides.txt").read_text().splitlines() == ["cluster=dev", "data.root=it's here"]
    assert f"--folder {folder} --attempt 1" in (tmp_path / "bin/srun.calls").read_text()
