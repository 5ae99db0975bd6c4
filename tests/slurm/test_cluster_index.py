"""An index built by a job on the real cluster equals one that is built here."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Mixtera = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slurm


def test_an_index_built_by_a_job_of_two_nodes_has_the_same_bytes(mixtera: Mixtera, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(5):
        rows = [json.dumps({"text": f"text {j} " * (j % 9), "c": f"v{i * j % 5}"}) for j in range(50 * i + 1)]
        (tmp_path / "data" / f"{i}.jsonl").write_text("\n".join(rows))
    words = [f"data.root={tmp_path / 'data'}", "data.properties.c=c"]
    mixtera("index", "build", *words, f"index.path={tmp_path / 'here.h5'}")
    job = ["--submit", "--wait", "cluster=dev", "job.nodes=2", "job.ranks_per_node=2", 'job.time="00:10:00"']
    done = mixtera("index", "build", *words, f"index.path={tmp_path / 'job.h5'}", *job)
    assert "[0] " in done.stdout, "the report of rank 0"
    assert (tmp_path / "job.h5").read_bytes() == (tmp_path / "here.h5").read_bytes()


def test_a_job_that_cannot_build_fails_and_names_the_row(mixtera: Mixtera, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{bad\n")
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", 'job.time="00:10:00"']
    done = mixtera("index", "build", *words, "--submit", "--wait", "cluster=dev", "job.ranks_per_node=2", check=False)
    assert done.returncode != 0, done.stdout + done.stderr
    assert "row=0: " in done.stdout and not (tmp_path / "i.h5").exists()
