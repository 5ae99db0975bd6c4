"""`mixtera-hpc demo` as a newcomer starts it: an empty folder, no configuration, and nothing left anywhere else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder it ran in, and what it printed."""
    here = tmp_path_factory.mktemp("newcomer")
    for name in ("work", "home", "tmp"):
        (here / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MIXTERA_", "XDG_"))}
    environment |= {"HOME": str(here / "home"), "TMPDIR": str(here / "tmp")}
    caches = str(here / "work" / ".cache")  # As `make` does: matplotlib and torch keep theirs at home otherwise.
    environment |= {"MPLCONFIGDIR": caches, "TORCHINDUCTOR_CACHE_DIR": caches}
    done = subprocess.run(
        [sys.executable, "-m", "mixtera_hpc", "demo", "training.num_steps=24"],
        capture_output=True,
        text=True,
        cwd=here / "work",
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return here, done.stdout


def test_leaves_a_run_and_a_report(demo: tuple[Path, str]) -> None:
    here, printed = demo
    assert "verified: 768 sequences of 24 steps, each consumed exactly once" in printed
    (report,) = here.glob("work/runs/demo/*/report/report.html")
    page = report.read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert len(list(report.parent.glob("*.png"))) >= 3


def test_finds_domains_of_very_unequal_size(demo: tuple[Path, str]) -> None:
    here, _ = demo
    done = subprocess.run(
        [sys.executable, "-m", "mixtera_hpc", "query", "experiment=demo", "--json"],
        capture_output=True,
        text=True,
        cwd=here / "work",
        check=True,
    )
    sizes = [domain["tokens"] for domain in json.loads(done.stdout)["domains"]]
    assert len(sizes) >= 5
    assert max(sizes) > 5 * min(sizes)


def test_writes_nothing_outside_its_folder(demo: tuple[Path, str]) -> None:
    here, _ = demo
    assert list((here / "home").iterdir()) == []
    assert list((here / "tmp").iterdir()) == []
