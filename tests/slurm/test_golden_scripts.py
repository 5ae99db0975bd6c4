"""The scripts of all clusters, byte by byte: they show what a new submitit or a changed template does."""

import difflib
import os
import subprocess
from pathlib import Path

import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script

GOLDEN = Path(__file__).with_name("golden")
CLUSTERS = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))
ACCEPT = "MIXTERA_ACCEPT=1 python -m pytest tests/slurm/test_golden_scripts.py"


def script(cluster: str) -> str:
    words = ["data.root=/data", "mixture.unit=samples", "run.name=golden", f"cluster={cluster}", "job.nodes=2"]
    words += ["job.account=project", "job.max_attempts=3", "cluster.python=/opt/venv/bin/python"]
    return render_script(SbatchJob(config=compose(words), folder=Path("/runs/golden/20261123-161004-7f3a")))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_script_equals_the_recorded_one(cluster: str) -> None:
    path = GOLDEN / f"{cluster}.sh"
    text = script(cluster)
    if os.environ.get("MIXTERA_ACCEPT"):
        path.write_text(text)
    recorded = path.read_text() if path.exists() else ""
    diff = "\n".join(difflib.unified_diff(recorded.splitlines(), text.splitlines(), str(path), "rendered", lineterm=""))
    assert text == recorded, f"{diff}\nIf this change is intended, accept it with: {ACCEPT}"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_bash_can_read_the_script(cluster: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script(cluster), capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_every_recorded_script_has_its_cluster() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.sh")) == CLUSTERS
