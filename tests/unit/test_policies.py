"""Rules that concern the whole code base: exports, file sizes, verbs, imports, errors, links."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixtera_hpc
from mixtera_hpc import errors
from mixtera_hpc.cli.main import GROUPS, VERBS, main

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mixtera_hpc"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
INTEGRATIONS = sorted((PACKAGE / "integrations").rglob("[!_]*.py"))
LIBRARIES_OF_INTEGRATIONS = {"transformers", "accelerate", "lightning", "torchtitan", "tyro", "torchdata", "megatron"}
FROZEN_VERBS = {
    *("demo", "index", "query", "plan", "trace", "run", "submit", "sweep", "status", "logs", "cancel", "resume"),
    *("report", "check", "doctor", "mixture"),
}
HEAVY = {"mpi4py", "torch", "hydra", "omegaconf", "pyarrow", "rich", "submitit", "matplotlib", "tokenizers"}
"""Libraries that make `--help` slow. numpy and h5py take less than 0.1 s each, so a verb's module may import them."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def wrong_exports(path: Path) -> list[str]:
    module = importlib.import_module(".".join(("mixtera_hpc", *path.relative_to(PACKAGE).with_suffix("").parts)))
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    return [f"{name_of(path)}: __all__ is empty, or names {missing}"] if missing or not module.__all__ else []


def test_a_module_defines_the_names_it_exports() -> None:
    wrong = [line for path in MODULES if path not in INTEGRATIONS for line in wrong_exports(path)]
    assert not wrong, "\n".join(wrong)


def test_the_examples_import_names_that_exist() -> None:
    """Their trainers are not installed here, so the examples themselves cannot be imported."""
    missing = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # Integrations import their trainers; the tests above check what they export.
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mixtera_hpc"):
                continue
            if (node.module or "").startswith("mixtera_hpc.integrations"):
                continue
            module = importlib.import_module(str(node.module))
            missing += [f"{path}: {node.module}.{each.name}" for each in node.names if not hasattr(module, each.name)]
    assert not missing


@pytest.mark.parametrize("path", INTEGRATIONS, ids=name_of)
def test_an_integration_defines_the_names_it_exports(path: Path) -> None:
    try:
        assert wrong_exports(path) == []
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in LIBRARIES_OF_INTEGRATIONS:
            raise
        pytest.skip(f"{library} is not installed")


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def simple_queues_with_timeouts(path: Path) -> list[str]:
    text = path.read_text()
    queues = set(re.findall(r'(\w+): "?queue\.SimpleQueue', text))
    return [f"{name_of(path)}: {name}" for name in re.findall(r"(\w+)\.get\([^)]", text) if name in queues]


def test_no_timeout_is_given_to_a_simple_queue() -> None:
    """In Python 3.11, `SimpleQueue.get` waits for ever if the time runs out between its first try and its wait."""
    assert [line for path in MODULES for line in simple_queues_with_timeouts(path)] == []


def test_verbs_that_users_script_exist() -> None:
    assert set(VERBS) >= FROZEN_VERBS
    for verb in VERBS:
        assert callable(importlib.import_module(f"mixtera_hpc.cli.verbs.{verb}").run)


def imported_by(statements: str) -> set[str]:
    """Return the top-level packages that a new Python process has imported after `statements`."""
    program = f"{statements}; import sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_no_heavy_library() -> None:
    loaded = imported_by("from mixtera_hpc.cli.main import main; assert main(['--help']) == 0")
    assert loaded & {*HEAVY, "numpy", "h5py"} == set()


def test_help_of_a_verb_imports_no_heavy_library() -> None:
    modules = ", ".join(f"mixtera_hpc.cli.verbs.{verb}" for verb in VERBS)
    assert imported_by(f"import {modules}") & HEAVY == set()


def test_help_of_the_verbs_that_start_runs_imports_no_numpy() -> None:
    modules = ", ".join(f"mixtera_hpc.cli.verbs.{verb}" for verb in ("run", "submit", "sweep", "resume"))
    assert imported_by(f"import {modules}") & {*HEAVY, "numpy", "h5py"} == set()


def test_help_lists_every_verb_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(VERBS)
    assert [line for line in lines if line in {f"{group}:" for group in GROUPS}] == [f"{group}:" for group in GROUPS]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_describes_every_argument(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert VERBS[verb][1:40] in " ".join(text.split())


def test_the_public_names_are_sorted_and_exist() -> None:
    assert mixtera_hpc.__all__ == sorted(mixtera_hpc.__all__)
    assert set(mixtera_hpc.__all__) <= set(dir(mixtera_hpc))
    for name in mixtera_hpc.__all__:
        assert getattr(mixtera_hpc, name) is not None


def test_all_errors_are_public() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name for name in classes if issubclass(getattr(errors, name), errors.MixteraError)} <= {
        *mixtera_hpc.__all__
    }


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DataPlan'"):
        mixtera_hpc.DataPlan  # noqa: B018


def test_importing_the_package_imports_no_other_part_of_it() -> None:
    loaded = imported_by("import mixtera_hpc, sys; assert 'mixtera_hpc.errors' not in sys.modules; dir(mixtera_hpc)")
    assert loaded & {*HEAVY, "numpy", "h5py"} == set()


def test_every_error_has_the_exit_code_of_the_drawn_tree() -> None:
    drawn = dict(re.findall(r"(\w+)\s+(\d+) ", errors.__doc__ or ""))
    for name in ("MixteraError", "UserError", "CommError", "SavedAndStopped"):
        assert getattr(errors, name).exit_code == int(drawn[name])
    for error in errors.UserError.__subclasses__():
        assert error.exit_code == 2
        assert error.__name__ in (errors.__doc__ or "")


def test_links_between_documents_resolve() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
