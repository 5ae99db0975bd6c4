"""A package of an extra that is not installed is named with the command that installs it."""

import subprocess
import sys

import pytest

from mixtera_hpc.errors import EXTRAS

USES = {
    "torch": "import mixtera_hpc; mixtera_hpc.PlaneDataset",
    "mpi4py": "from mixtera_hpc.comm.launcher import open_communicator; open_communicator('mpi')",
}
VERBS = {
    "torch": ["run", "data.root=/data", "mixture.unit=samples"],
    "submitit": ["submit", "--dry-run", "experiment=demo", "cluster=dev"],
}


def run_without(package: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program` in a process in which `package` cannot be imported."""
    command = [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None\n{program}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", USES)
def test_a_library_user_reads_which_extra_to_install(package: str) -> None:
    done = run_without(package, USES[package])

    assert f"UserError: The package {package} is not installed" in done.stderr
    assert f"pip install 'mixtera-hpc[{EXTRAS[package]}]'" in done.stderr


def test_a_launcher_of_mpi_without_mpi4py_is_answered_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    program = "from mixtera_hpc.comm.launcher import open_communicator; open_communicator()"
    done = run_without("mpi4py", program)

    assert "UserError: The package mpi4py is not installed" in done.stderr
    assert f"pip install 'mixtera-hpc[{EXTRAS['mpi4py']}]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", VERBS)
def test_a_verb_exits_with_2_and_names_the_extra(package: str) -> None:
    program = "import sys; from mixtera_hpc.cli.main import main; sys.exit(main())"
    done = run_without(package, program, *VERBS[package])

    assert done.returncode == 2, done.stderr
    assert f"pip install 'mixtera-hpc[{EXTRAS[package]}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_extra_exists() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
