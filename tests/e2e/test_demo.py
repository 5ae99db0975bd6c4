"""`mixtera-hpc demo` in an empty folder, without any configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of the demo and its output."""
    here = tmp_path_factory.mktemp("newcomer")
    for name in ("work", "home", "tmp"):
        (here / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MIXTERA_", "XDG_"))}
    environment |= {"HOME": str(here / "home"), "TMPDIR": str(here / "tmp")}
    caches = str(here / "work" / ".cache")  # As `make` does. By default, matplotlib and torch cache below HOME.
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


def test_the_demo_writes_a_run_and_a_report(demo: tuple[Path, str]) -> None:
    here, printed = demo
    assert "verified: 768 sequences of 24 steps, each consumed exactly once" in printed
    (report,) = here.glob("work/runs/demo/*/report/report.html")
    page = report.read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert len(list(report.parent.glob("*.png"))) >= 3


def test_the_demo_has_domains_of_very_different_size(demo: tuple[Path, str]) -> None:
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


def test_the_demo_writes_nothing_outside_its_folder(demo: tuple[Path, str]) -> None:
    here, _ = demo
    assert list((here / "home").iterdir()) == []
    assert list((here / "tmp").iterdir()) == []
