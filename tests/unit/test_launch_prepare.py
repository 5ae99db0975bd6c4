"""The folder of a run before anything runs, and its attempts."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import (
    ExitRecord,
    JobRecord,
    create_attempt,
    end_attempt,
    read_end,
    read_start,
    record_start,
    start_local_attempt,
)
from mixtera_hpc.launch.manifest import visible_environment
from mixtera_hpc.launch.prepare import prepare_run, replace_config

MakeConfig = Callable[..., Config]
NOW = datetime(2026, 11, 23, 16, 10, 4, tzinfo=UTC)


def test_the_recorded_configuration_is_the_composed_one(make_config: MakeConfig) -> None:
    config = make_config("dataplane.seed=7")

    folder = prepare_run(config, ["dataplane.seed=7"], NOW)

    assert folder.run_id.startswith("20261123-161004-")
    assert load_config(folder.config) == replace(config, run=replace(config.run, id=folder.run_id))
    assert folder.overrides.read_text() == "dataplane.seed=7\n"


def test_shell_variables_in_a_configuration_are_not_expanded(make_config: MakeConfig) -> None:
    config = make_config()
    config = replace(config, cluster=replace(config.cluster, setup=["echo ${HOME%%/*} $((1 + 1))"]))

    folder = prepare_run(config, [], NOW)

    assert load_config(folder.config).cluster.setup == ["echo ${HOME%%/*} $((1 + 1))"]


def test_the_same_run_started_twice_within_a_second_has_two_folders(make_config: MakeConfig) -> None:
    config = make_config()

    assert prepare_run(config, [], NOW).path != prepare_run(config, [], NOW).path


def test_a_run_id_cannot_be_used_twice(make_config: MakeConfig) -> None:
    config = make_config("run.id=mine")
    prepare_run(config, [], NOW)

    with pytest.raises(LaunchError, match=r"run\.id=mine exists"):
        prepare_run(config, [], NOW)


def test_recorded_paths_are_absolute(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    folder = prepare_run(make_config("data.root=data", "run.root=elsewhere"), [], NOW)

    recorded = load_config(folder.config)
    assert recorded.data.root == str(tmp_path / "data")
    assert recorded.index.path == str(tmp_path / "data/index.h5")
    assert recorded.run.root == str(tmp_path / "elsewhere")


def test_the_manifest_names_code_and_versions(make_config: MakeConfig) -> None:
    facts = json.loads(prepare_run(make_config(), [], NOW).manifest.read_text())

    assert facts["versions"]["numpy"]
    assert set(facts) >= {"command", "git", "host", "python", "environment"}


def test_secrets_of_the_environment_are_not_recorded() -> None:
    environment = {"WANDB_API_KEY": "x", "SLURM_JWT": "x", "NCCL_TOKEN": "x", "HOME": "/h", "NCCL_DEBUG": "INFO"}

    assert visible_environment(environment) == {"NCCL_DEBUG": "INFO"}


def test_attempts_are_numbered_and_old_requests_removed(make_config: MakeConfig) -> None:
    folder = prepare_run(make_config(), [], NOW)
    for name in ("stop", "save", "cancelled"):
        (folder.control / name).touch()

    assert [create_attempt(folder), create_attempt(folder)] == [1, 2]
    assert folder.logs(2).is_dir()
    assert list(folder.control.iterdir()) == []


def test_a_local_attempt_records_its_process(make_config: MakeConfig) -> None:
    config = make_config()
    folder = prepare_run(config, [], NOW)

    start = read_start(folder, start_local_attempt(folder, config, ranks=8))

    assert start is not None
    assert (start.kind, start.pid, start.ranks, start.limit_s) == ("local", os.getpid(), 8, None)


def test_inside_a_batch_job_the_attempt_is_that_of_the_script(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    folder = prepare_run(config, [], NOW)
    monkeypatch.setenv("MIXTERA_RUN_FOLDER", str(folder.path))
    monkeypatch.setenv("MIXTERA_ATTEMPT", "3")

    assert start_local_attempt(folder, config) == 3
    assert folder.attempts() == []


def test_start_and_end_of_an_attempt_are_read_back(make_config: MakeConfig) -> None:
    config = make_config("job.nodes=2", 'job.time="00:30:00"')
    folder = prepare_run(config, [], NOW)
    attempt = create_attempt(folder)
    assert read_start(folder, attempt) is None

    record_start(folder, attempt, JobRecord.slurm(config, "4711"))
    end_attempt(folder, attempt, ExitRecord(exit_code=75, elapsed_s=12))

    start = read_start(folder, attempt)
    assert start is not None
    assert (start.kind, start.job_id, start.nodes, start.limit_s) == ("slurm", "4711", 2, 1800)
    assert read_end(folder, attempt) == ExitRecord(exit_code=75, elapsed_s=12)


def test_a_half_written_record_is_ignored(make_config: MakeConfig) -> None:
    folder = prepare_run(make_config(), [], NOW)
    attempt = create_attempt(folder)
    (folder.attempt(attempt) / "exit.json").write_text('{"exit_co')

    assert read_end(folder, attempt) is None


def test_a_replaced_configuration_is_kept_with_its_attempt(make_config: MakeConfig) -> None:
    folder = prepare_run(make_config(), ["a=1"], NOW)
    before = folder.config.read_text()
    create_attempt(folder)

    replace_config(folder, {"data": "other"}, ["b=2"])

    assert (folder.attempt(1) / "config.yaml").read_text() == before
    assert folder.config.read_text() == "data: other\n"
    assert folder.overrides.read_text() == "a=1\nb=2\n"
