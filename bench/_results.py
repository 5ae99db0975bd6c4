"""Files in which benchmarks write their results."""

import json
from pathlib import Path
from typing import Any

__all__ = ["OUT", "write_results"]

OUT = Path(__file__).resolve().parent / "out"


def write_results(name: str, content: dict[str, Any]) -> None:
    """Write the results of a benchmark to `bench/out/<name>.json`."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
