"""Arrows point down: the imports of every file are walked, and a wrong one is named."""

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mixtera_hpc"
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "core": {"errors"},
    "config": {"core", "errors"},
    "comm": {"errors"},
    "formats": {"core", "config", "tokens", "errors"},
    "tokens": {"core", "config", "errors"},
    "track": {"config", "errors"},
    "index": {"core", "config", "comm", "formats", "tokens", "errors"},
    "dataplane": {"core", "config", "comm", "index", "formats", "tokens", "track", "launch", "errors"},
    "trace": {"core", "config", "comm", "index", "formats", "tokens", "track", "dataplane", "errors"},
    "integrations": {"core", "config", "comm", "track", "dataplane", "errors"},
    "training": {
        *("core", "config", "comm", "index", "formats", "tokens", "track", "dataplane"),
        *("integrations", "launch", "errors"),
    },
    "report": {"core", "config", "track", "errors"},
    "launch": {"core", "config", "errors"},
    "swarm": {"core", "config", "comm", "dataplane", "launch", "track", "report", "errors"},
    "cli": {
        *("core", "config", "comm", "index", "formats", "tokens", "track", "dataplane"),
        *("trace", "training", "report", "launch", "swarm", "errors"),
    },
    "testing": {"core", "config", "comm", "index", "formats", "tokens", "track", "dataplane", "errors"},
}
ONLY_IN = {
    "mpi4py": ["comm/mpi.py"],
    "h5py": ["index/"],
    "omegaconf": ["config/"],
    "hydra": ["config/", "training/__main__.py", "cli/"],
    "pyarrow": ["formats/", "cli/demo_corpus.py", "testing/"],
    "torch": [
        "comm/torch_distributed.py",
        "training/",
        "integrations/",
        "dataplane/steps/device_sums.py",
        "cli/verbs/doctor.py",
    ],
    "transformers": ["integrations/transformers.py"],
    "accelerate": ["integrations/transformers.py", "integrations/torch.py"],
    "lightning": ["integrations/lightning"],
    "torchtitan": ["integrations/torchtitan"],
    "megatron": ["integrations/megatron"],
    "submitit": ["launch/"],
    "matplotlib": ["report/", "swarm/swarm_plots.py"],
    "jinja2": ["tokens/chat_template.py"],
    "scipy": [],
    "rich": ["cli/", "report/"],
}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too, TYPE_CHECKING excluded."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and isinstance(guard.test, ast.Name) and guard.test.id == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def test_a_file_imports_only_layers_below_its_own() -> None:
    wrong = []
    for path in FILES:
        own = layer(path)
        if own == "__init__" or path.name == "__main__.py":  # An entry point stands above all layers.
            continue
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("mixtera_hpc.") else own
            if other not in (own, "__version__") and other not in BELOW[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}: {own} may not import {other}")
    assert not wrong, "\n".join(wrong)


def test_a_library_is_imported_only_where_it_belongs() -> None:
    wrong = []
    for path in FILES:
        relative = str(path.relative_to(PACKAGE))
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is not None and not relative.startswith(tuple(allowed)):
                wrong.append(f"{relative} imports {name}; only {allowed} may")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_part_of_an_import_cycle() -> None:
    modules = {".".join(("mixtera_hpc", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES}
    graph = {name: {target for n in imports(path) if (target := _module(n, modules))} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, "import cycle: " + " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    sys.setrecursionlimit(10_000)
    for name in graph:
        visit(name, [])


def _module(name: str, modules: dict[str, Path]) -> str | None:
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None
