"""Continuing a run: which keys may change, which may not, and how changes are applied."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.launch.attempts import (
    ExitRecord,
    JobRecord,
    create_attempt,
    end_attempt,
    record_start,
    start_local_attempt,
)
from mixtera_hpc.launch.cancel import cancel_after_save, cancel_now
from mixtera_hpc.launch.claim import Claim
from mixtera_hpc.launch.newest_attempt import check_ended, was_submitted
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.resume import ResumeRequest, amended_config, record_config

pytestmark = pytest.mark.slow
"""Composes and records many runs."""

MakeConfig = Callable[..., Config]
MakeCommand = Callable[[str, str], Path]
TYPED = ["data.root=/data", "mixture.unit=samples", "run.name=trial"]


@pytest.fixture
def folder(make_config: MakeConfig) -> RunFolder:
    return prepare_run(make_config(), TYPED, datetime.now(UTC))


def submit(folder: RunFolder, config: Config, job_id: str = "4711") -> None:
    record_start(folder, create_attempt(folder), JobRecord.slurm(config, job_id))


def test_time_nodes_and_length_may_change(folder: RunFolder) -> None:
    overrides = ["job.nodes=4", 'job.time="02:00:00"', "training.num_steps=500", "checkpoint.every_steps=9"]

    config = amended_config(folder, overrides)

    assert (config.job.nodes, config.job.time, config.training.num_steps) == (4, "02:00:00", 500)
    assert config.run == load_config(folder.config).run


def test_another_cluster_replaces_all_keys_of_the_cluster(folder: RunFolder) -> None:
    config = amended_config(folder, ["cluster=clariden"])

    assert (config.cluster.name, config.cluster.gpus_per_node, config.job.partition) == ("clariden", 4, "normal")
    assert config.cluster.env["FI_PROVIDER"] == "cxi"

    record_config(folder, config, ["cluster=clariden"])
    back = amended_config(folder, ["cluster=dev"])
    assert (back.cluster.name, back.cluster.env) == ("dev", {})


@pytest.mark.parametrize(
    "override",
    [
        "dataplane.seed=1",
        "dataplane.global_batch_size=128",
        "dataplane.shuffle=none",
        "data.root=/elsewhere",
        "index.path=/elsewhere.h5",
        "index.paths=[/elsewhere.h5]",
        "query.where='a > 1'",
        "mixture=ado",
        "training.embedding_dim=256",
        "run.name=other",
    ],
)
def test_a_changed_identity_key_is_refused_and_named(folder: RunFolder, override: str) -> None:
    name = override.partition("=")[0]
    key = "mixture.kind" if name == "mixture" else name

    with pytest.raises(LaunchError, match=key.replace(".", r"\.")):
        amended_config(folder, [override])


def test_all_changed_identity_keys_are_named_at_once(folder: RunFolder) -> None:
    with pytest.raises(LaunchError) as caught:
        amended_config(folder, ["dataplane.seed=1", "training.num_layers=9", "job.nodes=2"])

    assert "dataplane.seed: 0 before, 1 now" in str(caught.value)
    assert "training.num_layers" in str(caught.value)
    assert "job.nodes" not in str(caught.value)


def test_a_resumed_configuration_is_checked(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"job\.time"):
        amended_config(folder, ["job.time=45000"])


def test_a_key_that_is_not_given_keeps_its_recorded_value(folder: RunFolder, make_config: MakeConfig) -> None:
    """Configs may have changed since; the recorded configuration wins."""
    recorded = load_config(folder.config)
    record_config(folder, replace(recorded, training=replace(recorded.training, learning_rate=0.5)), ["job.nodes=1"])

    assert amended_config(folder, ["job.nodes=2"]).training.learning_rate == 0.5


def test_changes_accumulate_over_attempts(folder: RunFolder) -> None:
    for override in ("job.nodes=2", "job.nodes=4", 'job.time="00:20:00"'):
        record_config(folder, amended_config(folder, [override]), [override])

    config = amended_config(folder, [])
    assert (config.job.nodes, config.job.time) == (4, "00:20:00")


def test_drops_are_not_part_of_the_configuration(folder: RunFolder) -> None:
    request = ResumeRequest(drop=("source == 'a'",))
    assert amended_config(folder, [], request) == load_config(folder.config)
    with pytest.raises(ConfigError, match="drop"):
        amended_config(folder, ["query.drop=[]"], request)


def test_a_running_run_is_not_continued(folder: RunFolder, make_config: MakeConfig, command: MakeCommand) -> None:
    submit(folder, make_config())
    command("squeue", "echo '4711|RUNNING|None|2|0:10|1:00:00'")

    with pytest.raises(LaunchError, match="job 4711"):
        check_ended(folder)

    end_attempt(folder, 1, ExitRecord(exit_code=75, elapsed_s=1))
    check_ended(folder)


def test_a_run_of_which_slurm_says_nothing_is_not_continued(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config())
    command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")

    with pytest.raises(LaunchError, match="not known whether attempt 1"):
        check_ended(folder)


def test_a_run_whose_next_job_waits_is_not_continued(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config())
    end_attempt(folder, 1, ExitRecord(exit_code=137, elapsed_s=1))
    folder.follow_up(1).write_text("4712\n")
    command("squeue", "echo '4712|PENDING|Dependency|2|0:00|1:00:00'")

    with pytest.raises(LaunchError, match="PENDING as job 4712"):
        check_ended(folder)


def test_a_local_run_on_another_host_is_continued_only_if_it_is_silent(
    folder: RunFolder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = JobRecord.local(make_config())
    record_start(folder, create_attempt(folder), replace(record, host="another"))
    monkeypatch.setattr("mixtera_hpc.launch.claim.RENEWAL_S", 0.05)
    monkeypatch.setattr("mixtera_hpc.launch.claim.SILENCE_S", 3.0)
    with contextlib.closing(Claim(folder, 1)), pytest.raises(LaunchError, match="running on host another"):
        check_ended(folder)

    assert check_ended(folder) == 1


def test_one_of_two_processes_that_continue_a_run_at_once_is_refused(
    folder: RunFolder, make_config: MakeConfig
) -> None:
    config = make_config()
    for _ in range(2):
        end_attempt(folder, start_local_attempt(folder, config), ExitRecord(exit_code=75, elapsed_s=1))
    both = [check_ended(folder), check_ended(folder)]
    assert create_attempt(folder, after=both[0]) == 3
    with pytest.raises(LaunchError, match=r"Attempt 3 of .* is being started by another process"):
        create_attempt(folder, after=both[1])


def test_a_run_whose_next_attempt_is_being_submitted_is_not_continued(folder: RunFolder) -> None:
    create_attempt(folder)
    with pytest.raises(LaunchError, match="is being started by another process"):
        check_ended(folder)
    long_ago = 1_700_000_000
    os.utime(folder.attempt(1), (long_ago, long_ago))
    assert check_ended(folder) == 1


def test_a_process_that_reuses_the_id_of_a_killed_run_is_not_taken_for_it(
    folder: RunFolder, make_config: MakeConfig
) -> None:
    attempt = start_local_attempt(folder, make_config())
    path = folder.attempt(attempt) / "job.json"
    start = json.loads(path.read_text())
    path.write_text(json.dumps({**start, "pid_start_ticks": start["pid_start_ticks"] - 1}))
    with pytest.raises(LaunchError, match=r"No job or process of .* is waiting or running"):
        cancel_now(folder)
    assert check_ended(folder) == attempt


def test_a_run_was_submitted_if_its_newest_attempt_was(folder: RunFolder, make_config: MakeConfig) -> None:
    assert not was_submitted(folder)
    submit(folder, make_config())
    assert was_submitted(folder)
    start_local_attempt(folder, make_config())
    assert not was_submitted(folder)


def test_cancel_ends_the_run_and_its_follow_up_jobs(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config(), "1")
    end_attempt(folder, 1, ExitRecord(exit_code=75, elapsed_s=1))
    submit(folder, make_config(), "2")
    submit(folder, make_config(), "3")
    command("squeue", "echo '2|RUNNING|None|2|0:10|1:00:00'; echo '3|PENDING|Dependency|2|0:00|1:00:00'")
    calls = command("scancel", "exit 0")

    assert cancel_now(folder).ended == ("2", "3")

    assert calls.read_text() == "--quiet 2 3\n"
    assert (folder.control / "cancelled").exists()


def test_cancel_after_save_stops_running_jobs_and_ends_waiting_jobs(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config(), "2")
    submit(folder, make_config(), "3")
    command("squeue", "echo '2|RUNNING|None|2|0:10|1:00:00'; echo '3|PENDING|Dependency|2|0:00|1:00:00'")
    calls = command("scancel", "exit 0")

    done = cancel_after_save(folder)

    assert (done.ended, done.saving) == (("3",), ("2",))
    assert calls.read_text() == "--quiet 3\n"
    assert {path.name for path in folder.control.iterdir()} == {"cancelled", "stop"}


def test_a_run_that_has_ended_cannot_be_cancelled(folder: RunFolder, make_config: MakeConfig) -> None:
    submit(folder, make_config())
    end_attempt(folder, 1, ExitRecord(exit_code=0, elapsed_s=1))

    with pytest.raises(LaunchError, match="is waiting or running"):
        cancel_now(folder)


def test_two_lengths_of_sequences_are_refused(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(folder.path), "--change-seq-len", "64", "dataplane.seq_len=32"]) == 2
    assert "--change-seq-len is 64, but dataplane.seq_len=32 is given as well" in capsys.readouterr().err


def test_sizes_change_with_their_flag_only(folder: RunFolder) -> None:
    ramp = "dataplane.batch_schedule=[{start: 4, size: 128}]"
    with pytest.raises(LaunchError, match=r"add --change-batch-size for dataplane\.batch_schedule"):
        amended_config(folder, [ramp])
    config = amended_config(folder, [ramp], ResumeRequest(change_batch_size=True))
    assert [(stage.start, stage.size) for stage in config.dataplane.batch_schedule] == [(4, 128)]
    with pytest.raises(LaunchError, match=r"--change-seq-len is given, but mixture\.unit=samples"):
        amended_config(folder, ["dataplane.seq_len=64"], ResumeRequest(change_seq_len=True))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{start: 0, size: 8}]", r"batch_schedule\[0\]\.start is 0, expected above 0"),
        ("[{start: 5, size: 8}, {start: 5, size: 9}]", r"batch_schedule\[1\]\.start is 5, expected above 5"),
        ("[{start: 5, size: 0}]", r"batch_schedule\[0\]\.size is 0, expected at least 1"),
        ("[{start: 5, size: 1000000}]", "the largest global batch is 8000000"),
        ("[{start: 5}]", "size"),
    ],
)
def test_a_wrong_ramp_is_refused(folder: RunFolder, stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        amended_config(folder, [f"dataplane.batch_schedule={stages}"], ResumeRequest(change_batch_size=True))


def test_a_job_need_not_share_the_stages_of_a_ramp_that_are_past(folder: RunFolder) -> None:
    ramp = "dataplane.batch_schedule=[{start: 4, size: 96}]"
    words = [ramp, "job.nodes=3", "job.ranks_per_node=1"]
    request = ResumeRequest(change_batch_size=True)
    refusal = r"dataplane\.global_batch_size is 64, which 3 ranks cannot share evenly"
    with pytest.raises(ConfigError, match=refusal):
        amended_config(folder, words, request)
    folder.checkpoint(4).mkdir(parents=True)
    assert amended_config(folder, words, request).job.nodes == 3
    with pytest.raises(ConfigError, match=refusal):
        amended_config(folder, words, replace(request, skip_steps=(3, 4)))
    # The checkpoints of a program may be elsewhere. It is checked again when it starts.
    folder.checkpoint(4).rmdir()
    assert amended_config(folder, [*words, "job.command=[mine]"], request).job.nodes == 3
