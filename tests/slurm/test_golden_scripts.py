"""The scripts of all clusters and environments, byte by byte: they show what a new submitit or a changed line does."""

import difflib
import os
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.config.job_shape import can_start
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.batch.templates import EXAMPLE_ENVIRONMENTS, templates
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script

GOLDEN = Path(__file__).with_name("golden")
CLUSTERS = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))
ACCEPT = "MIXTERA_ACCEPT=1 python -m pytest tests/slurm/test_golden_scripts.py"


REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = REPOSITORY / "slurm" / "templates"
ACCEPT_TEMPLATES = "python -m mixtera_hpc.launch.batch.templates slurm/templates"


def job(cluster: str, environment: str = "none") -> Config:
    words = ["data.root=/data", "mixture.unit=samples", "run.name=golden", f"cluster={cluster}", "job.nodes=2"]
    words += ["job.account=project", "job.max_attempts=3", *EXAMPLE_ENVIRONMENTS[environment]]
    if environment == "none":
        words.append("environment.python=/opt/venv/bin/python")
    return compose(words)


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    """Return every cluster with every environment that its srun can start."""
    clusters = [(name, job(name).cluster) for name in CLUSTERS]
    return tuple((name, kind) for name, shape in clusters for kind in EXAMPLE_ENVIRONMENTS if can_start(shape, kind))


def golden_file(cluster: str, environment: str) -> Path:
    return GOLDEN / (f"{cluster}.sh" if environment == "none" else f"{cluster}_{environment}.sh")


@cache
def script(cluster: str, environment: str) -> str:
    return render_script(SbatchJob(config=job(cluster, environment), folder=Path("/runs/golden/20261123-161004-7f3a")))


@pytest.mark.parametrize(("cluster", "environment"), pairs())
def test_the_script_equals_the_recorded_one(cluster: str, environment: str) -> None:
    path = golden_file(cluster, environment)
    text = script(cluster, environment)
    if os.environ.get("MIXTERA_ACCEPT"):
        path.write_text(text)
    recorded = path.read_text() if path.exists() else ""
    diff = "\n".join(difflib.unified_diff(recorded.splitlines(), text.splitlines(), str(path), "rendered", lineterm=""))
    assert text == recorded, f"{diff}\nIf this change is intended, accept it with: {ACCEPT}"


@pytest.mark.parametrize(("cluster", "environment"), pairs())
def test_bash_can_read_the_script(cluster: str, environment: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script(cluster, environment), capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_every_recorded_script_has_its_cluster() -> None:
    assert sorted(GOLDEN.glob("*.sh")) == sorted(golden_file(*pair) for pair in pairs())


def test_environments_that_a_cluster_cannot_start_are_refused() -> None:
    refused = [(name, kind) for name in CLUSTERS for kind in EXAMPLE_ENVIRONMENTS if (name, kind) not in pairs()]

    assert ("lumi", "uenv") in refused
    for cluster, environment in refused:
        with pytest.raises(ConfigError, match=f"has no cluster.{environment}_flag"):
            job(cluster, environment)


def test_the_templates_are_current() -> None:
    rendered = {template.name: template.text for template in templates()}
    recorded = {path.name: path.read_text() for path in TEMPLATES.glob("*.sbatch")}

    assert sorted(rendered) == sorted(recorded), f"write them with: {ACCEPT_TEMPLATES}"
    for name, text in rendered.items():
        assert text == recorded[name], f"{name} is not current, write it with: {ACCEPT_TEMPLATES}"


def test_shellcheck_finds_nothing_in_scripts_and_templates() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; on Debian: apt install shellcheck")
    files = [*GOLDEN.glob("*.sh"), *TEMPLATES.glob("*.sbatch")]

    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "")


def test_the_example_of_a_container_names_an_image() -> None:
    example = tomllib.loads((REPOSITORY / "examples" / "container.toml").read_text())

    assert set(example) == {"image", "mounts", "workdir", "annotations"}
    assert example["annotations"]["com"]["hooks"]["cxi"]["enabled"] == "true"
