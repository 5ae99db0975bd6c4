"""Print how the code reads, in figures next to their targets: `python -m bench.surface` (or `make surface`).

The figures describe the surface only: comments, packed assignments, line and function lengths. No figure is a test;
`make check` enforces the line length and the imperative docstrings.
"""

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mixtera_hpc"
COMMENTED = ("core", "dataplane", "index", "formats")
"""Packages whose comments are counted."""
MARKS = ("noqa", "type:", "pragma:")
"""Comments for tools, which are not counted."""
MAX_LINE = 120
MAX_FUNCTION = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure and its target."""

    name: str
    value: float
    target: str


def main() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    figures = [_comments(package) for package in COMMENTED]
    figures.append(_packed_assignments(files))
    figures.append(Figure(name=f"lines over {MAX_LINE} characters", value=_long_lines(files), target="0"))
    figures.append(Figure(name="docstrings that are not imperative (D401)", value=_findings("D401"), target="0"))
    figures.append(Figure(name=f"functions over {MAX_FUNCTION} lines", value=len(_long_functions(files)), target="0"))

    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        print(f"{figure.name:<{width}}  {figure.value:>8.4g}   target {figure.target}")
    for place in _long_functions(files):
        print(f"  long function: {place}")


def _comments(package: str) -> Figure:
    comments = 0
    lines = 0
    for path in (PACKAGE / package).rglob("*.py"):
        text = path.read_text()
        lines += sum(1 for line in text.splitlines() if line.strip())
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and not token.string.lstrip("# ").startswith(MARKS):
                comments += 1
    return Figure(name=f"comments per 100 lines in {package}/", value=100 * comments / lines, target="at least 4")


def _packed_assignments(files: Iterable[Path]) -> Figure:
    """Count `a, b = x, y`: a tuple of values that is taken apart at once."""
    packed = 0
    lines = 0
    for path in files:
        text = path.read_text()
        lines += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                packed += any(isinstance(target, ast.Tuple) for target in node.targets)
    return Figure(name="packed assignments per 1,000 lines", value=1000 * packed / lines, target="at most 2")


def _long_lines(files: Iterable[Path]) -> int:
    return sum(len(line) > MAX_LINE for path in files for line in path.read_text().splitlines())


def _long_functions(files: Iterable[Path]) -> list[str]:
    places = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION:
                places.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    return places


def _findings(rule: str) -> int:
    """Count what ruff finds of one rule."""
    command = [sys.executable, "-m", "ruff", "check", "--select", rule, "--output-format", "json", "--exit-zero"]
    done = subprocess.run([*command, str(PACKAGE)], capture_output=True, text=True, check=True)
    return len(json.loads(done.stdout))


if __name__ == "__main__":
    main()
