"""Rules of this codebase that no single part can keep by itself."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc import errors
from mixtera_hpc.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mixtera_hpc"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
FROZEN_VERBS = {
    *("demo", "index", "query", "plan", "trace", "run", "submit", "sweep", "status", "logs", "cancel", "resume"),
    *("report", "validate", "doctor", "mixture"),
}
HEAVY = ("mpi4py", "torch", "h5py", "hydra", "omegaconf", "pyarrow", "numpy", "rich", "submitit", "matplotlib")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_what_it_says_it_exports(path: Path) -> None:
    module = importlib.import_module(".".join(("mixtera_hpc", *path.relative_to(PACKAGE).with_suffix("").parts)))
    assert module.__all__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_stays_readable_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_verbs_that_users_script_stay() -> None:
    assert set(VERBS) >= FROZEN_VERBS
    for module, _ in VERBS.values():
        assert callable(importlib.import_module(f"mixtera_hpc.cli.{module}").run)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, json; from mixtera_hpc.cli.main import main; code = main(['--help']);"
        "print(json.dumps([code, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert not set(HEAVY) & set(loaded)


def test_every_error_has_the_exit_code_its_tree_draws() -> None:
    drawn = dict(re.findall(r"(\w+)\s+(\d+) ", errors.__doc__ or ""))
    for name in ("MixteraError", "UserError", "CommError", "SavedAndStopped"):
        assert getattr(errors, name).exit_code == int(drawn[name])
    for error in errors.UserError.__subclasses__():
        assert error.exit_code == 2
        assert error.__name__ in (errors.__doc__ or "")


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
