"""Run benchmarks: `python -m bench [NAME …]`. `python -m bench --help` lists them."""

import argparse
import ast
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str]) -> int:
    """Run the benchmarks that `arguments` name, by default all of them; return the exit code."""
    descriptions = {
        module.name: _first_line(FOLDER / f"{module.name}.py")
        for module in pkgutil.iter_modules([str(FOLDER)])
        if not module.name.startswith("_")
    }
    names = _parse(arguments, descriptions).names
    if unknown := [name for name in names if name not in descriptions]:
        print(f"{unknown[0]!r} is not a benchmark. Choose from: {', '.join(descriptions)}.", file=sys.stderr)
        return 2
    for name in names or descriptions:
        print(f"\n=== bench.{name}: {descriptions[name]}", flush=True)
        importlib.import_module(f"bench.{name}").main()
    return 0


def _parse(arguments: Sequence[str], descriptions: dict[str, str]) -> argparse.Namespace:
    width = max(map(len, descriptions))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in descriptions.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run benchmarks. Each prints a table and writes its results as JSON to bench/out/NAME.json.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    # The benchmarks read these options from sys.argv themselves.
    parser.add_argument("--quick", action="store_true", help="index: use a tenth of the rows")
    parser.add_argument("--small", action="store_true", help="peers: a small corpus and short rounds, three minutes")
    parser.add_argument("--only", metavar="SECTION,…", help="peers: only these sections, for example documents,tokens")
    parser.add_argument("--corpus", metavar="NAME", action="append", help="mixing: only this corpus (may be repeated)")
    parser.add_argument("--seeds", metavar="N", type=int, help="mixing: seeds of every mixture (default: 3)")
    parser.add_argument("--mixture", metavar="NAME", action="append", help="mixing: natural and only this mixture")
    parser.add_argument("--swarm", metavar="CORPUS=PATH", action="append", help="mixing: a proposed mixture.yaml")
    return parser.parse_args(arguments)


def _first_line(path: Path) -> str:
    """Return the first line of the docstring of a module, without importing the module."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
