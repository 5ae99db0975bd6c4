"""GPU-hours of a forecast, from a given or a measured time of a step; and environments that do not exist."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.answers.job_time import JobTime
from mixtera_hpc.config.compose import prepare_application
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.submit import check_submittable

MakeConfig = Callable[..., Config]


def test_whole_nodes_are_counted_in_gpu_hours(make_config: MakeConfig) -> None:
    words = ["cluster=clariden", "job.nodes=16", "dataplane.global_batch_size=64", "plan.step_s=0.9"]

    text = JobTime.given(make_config(*words)).text(4000)

    assert "4,000 steps" in text or "4000 steps" in text
    assert "60 min on 16 nodes: 64 GPU-hours, 16 node-hours" in text


def test_the_median_of_a_run_leaves_out_the_first_line(make_config: MakeConfig) -> None:
    config = make_config("cluster=dev")
    folder = prepare_run(config, [], datetime.now(UTC))
    assert JobTime.measured(config, folder) is None
    folder.metrics.mkdir(exist_ok=True)
    step = {"loss": 1.0, "tokens": 1, "tokens_per_s": 1.0, "data_wait_s": 0.0, "domain_loss": [1.0]}
    step |= {"domain_tokens": [1], "domain_sequences": [1]}
    lines = [json.dumps(step | {"step": i, "step_s": 100.0 if i == 0 else 2.0}) for i in range(4)]
    folder.metric("steps").write_text("".join(f"{line}\n" for line in lines))
    attempt = {"step": 0, "num_nodes": 2, "num_ranks": 4, "num_steps": 10}
    folder.metric("attempts").write_text(json.dumps(attempt) + "\n")

    measured = JobTime.measured(config, folder)

    assert measured is not None
    assert (measured.step_s, measured.num_nodes, measured.num_devices) == (2.0, 2, 4)
    assert "rank-hours" in measured.text(1800)


@pytest.mark.parametrize("step_s", [".nan", "0", "-1", ".inf"])
def test_a_step_needs_a_positive_time(make_config: MakeConfig, step_s: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.step_s"):
        make_config(f"plan.step_s={step_s}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=dev", "environment=venv", "environment.venv=/nowhere/venv"], "has no bin/python"),
        (
            ["cluster=clariden", "job.account=a", "environment=container", "environment.image=/nowhere/edf.toml"],
            "/nowhere/edf.toml does not exist",
        ),
    ],
)
def test_a_job_is_refused_if_its_environment_does_not_exist(
    make_config: MakeConfig, command: Callable[[str, str], Path], words: list[str], message: str
) -> None:
    command("sbatch", "exit 1")

    with pytest.raises(ConfigError, match=message):
        check_submittable(make_config(*words))


def test_the_launcher_of_hydra_refuses_an_environment_that_it_would_ignore() -> None:
    words = ["hydra/launcher=submitit_slurm", "-m", "data.root=/data", "mixture.unit=samples", "environment=venv"]

    with pytest.raises(ConfigError, match=r"but environment\.kind is venv"):
        prepare_application([*words, "environment.venv=/venv", "dataplane.seed=1,2"])


def test_a_typed_value_of_the_launcher_of_hydra_is_kept() -> None:
    words = ["hydra/launcher=submitit_slurm", "-m", "data.root=/data", "mixture.unit=samples", "dataplane.seed=1,2"]

    computed = [word for word in prepare_application(words) if "signal_delay_s" in word]
    typed = prepare_application([*words, "hydra.launcher.signal_delay_s=7"])

    assert len(computed) == 1
    assert [word for word in typed if "signal_delay_s" in word] == ["hydra.launcher.signal_delay_s=7"]
