"""Experiments on clusters, without any cluster; and what a shared config must not contain."""

import os
import re
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.launch.check import CheckResult, check_all_pairs

pytestmark = pytest.mark.slow
"""Composes every experiment for every cluster."""

CONFIGS = sorted(conf_dir().rglob("*.yaml"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> CheckResult:
    """Check all pairs, with two experiments of the user, one of which fits no cluster."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "experiment").mkdir()
    usual = "# @package _global_\ndata: {root: '${oc.env:TEAM_SCRATCH}/data'}\nmixture: {unit: samples}\n"
    (folder / "experiment/good.yaml").write_text(usual)
    bad = "job: {time: '1 hour'}\ndataplane: {chunk_steps: 0}\n"
    (folder / "experiment/bad.yaml").write_text(usual + bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTERA_CONF", str(folder))
        return check_all_pairs()


def test_every_shipped_experiment_fits_every_shipped_cluster(result: CheckResult) -> None:
    assert "demo" in result.experiments
    assert [pair for pair in result.failures if pair.experiment != "bad"] == []
    assert result.num_pairs > (len(result.experiments) + 1) * len(result.clusters)


def test_one_configuration_is_checked_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.root=/data", "mixture.unit=samples", "cluster=clariden"]

    assert main(["check", *words]) == 0
    assert main(["check", *words, "job.nodes=0"]) == 2
    assert "job.nodes is 0" in capsys.readouterr().err
    assert main(["check", *words, "--all"]) == 2


def test_every_problem_of_every_pair_is_listed(result: CheckResult) -> None:
    failures = [pair for pair in result.failures if pair.experiment == "bad"]

    assert {pair.cluster for pair in failures} == set(result.clusters)
    assert all("job.time" in pair.problem and "chunk_steps" in pair.problem for pair in failures)


def test_an_unset_variable_is_replaced_by_a_placeholder_and_named(result: CheckResult) -> None:
    assert "TEAM_SCRATCH" in result.unset
    assert "TEAM_SCRATCH" not in os.environ


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(conf_dir())))
def test_no_shipped_config_contains_an_account_or_a_personal_folder(path: Path) -> None:
    text = path.read_text()

    assert not re.search(r"^\s*account:\s*(?!null|\$\{)\S", text, re.MULTILINE), "an account"
    assert not re.search(r"(/home/|/users/|/capstor/|/iopsstor/|/pscratch/|/scratch/|~/)\S", text), "an absolute folder"


def test_a_missing_account_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    words = ["check", "cluster=clariden", "data.root=/data", "mixture.unit=samples"]

    assert main(words) == 0
    assert "job.account is not set" in capsys.readouterr().out
    assert main([*words, "job.account=project"]) == 0
    assert "job.account" not in capsys.readouterr().out
