"""Every benchmark, one after the other: `python -m bench [names] [--quick]`. Tables on the terminal, JSON in bench/out."""

import importlib
import pkgutil
import sys
from pathlib import Path


def main(names: list[str]) -> int:
    """Run the benchmarks called `names`, or all there are; options are theirs."""
    names = [name for name in names if not name.startswith("--")]
    known = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))
    if unknown := [name for name in names if name not in known]:
        print(f"{unknown[0]!r} is no benchmark; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or known:
        print(f"\n=== bench.{name}", flush=True)
        importlib.import_module(f"bench.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
