"""Experiments on clusters, without any cluster; and what must never stand in a shared config."""

import os
import re
from pathlib import Path

import pytest

from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.launch.check import CheckResult, check_all_pairs

CONFIGS = sorted(conf_dir().rglob("*.yaml"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> CheckResult:
    """With a team's own experiments, one of which fits nowhere."""
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
    assert [misfit for misfit in result.misfits if misfit.experiment != "bad"] == []


def test_every_problem_of_every_pair_is_listed(result: CheckResult) -> None:
    misfits = [misfit for misfit in result.misfits if misfit.experiment == "bad"]

    assert {misfit.cluster for misfit in misfits} == set(result.clusters)
    assert all("job.time" in misfit.problem and "chunk_steps" in misfit.problem for misfit in misfits)


def test_an_unset_variable_is_stood_in_for_and_named(result: CheckResult) -> None:
    assert "TEAM_SCRATCH" in result.unset
    assert "TEAM_SCRATCH" not in os.environ


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(conf_dir())))
def test_no_shipped_config_holds_an_account_or_somebody_s_folder(path: Path) -> None:
    text = path.read_text()

    assert not re.search(r"^\s*account:\s*(?!null|\$\{)\S", text, re.MULTILINE), "an account"
    assert not re.search(r"(/home/|/users/|/capstor/|/iopsstor/|/pscratch/|/scratch/|~/)\S", text), "an absolute folder"
