"""Reading, tokenizing and packing next to other systems: torchdata, LitData, Hugging Face, Grain, Megatron-core.

    python -m bench peers [--small] [--only documents,tokens]

The first run installs the systems, in bench/out/peers/environments. A run takes up to 25 minutes; with `--small`, three
minutes on a small corpus, whose figures say little. Prints a table per section and writes bench/out/peers-part.json. A
complete run also writes bench/out/peers.json and docs/peers.md. Output of the processes is in bench/out/peers/logs.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench._peers import ours
from bench._peers.corpora import make_corpora
from bench._peers.environments import PEERS, Missing, interpreter
from bench._peers.goals import goal_rows
from bench._peers.page import aligned, write_page
from bench._peers.ratios import table_rows
from bench._peers.rounds import ROOT, Measured, Rounds, measure
from bench._peers.systems import SECTIONS, Section
from bench._peers.workload import Workload
from bench._results import write_results

FULL = Rounds(count=5, cpu_s=1.5, open_limit_s=300)
FULL_ROWS = 400_000
SMALL = Rounds(count=1, cpu_s=0.2, open_limit_s=120)
SMALL_ROWS = 20_000
OUR_PACKAGES = ("numpy", "msgspec", "gigatoken", "tokenizers", "zstandard")


def main() -> None:
    """Measure, print and write everything."""
    options = _parse(sys.argv)
    sections = [section for section in SECTIONS if not options.only or section.key in options.only]
    rounds = SMALL if options.small else FULL
    num_rows = SMALL_ROWS if options.small else FULL_ROWS
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "settings": {"num_rows": num_rows, "rounds": rounds.count, "cpu_s": rounds.cpu_s},
        "sections": [],
    }
    began_s = time.monotonic()
    work = _prepare(num_rows, sections)
    for section in sections:
        content["sections"].append(_measure(section, work, rounds))
        content["minutes"] = (time.monotonic() - began_s) / 60
        # A run that is ended early leaves what it has measured.
        write_results("peers-part", content)
    measured = {section["key"]: [Measured(**s) for s in section["systems"]] for section in content["sections"]}
    print(f"\nGoals\n{aligned(goal_rows(measured))}", flush=True)
    content["versions"] = _versions()
    write_results("peers-part", content)
    if not options.small and not options.only:
        write_results("peers", content)
        write_page(content)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of this benchmark; `bench.__main__` has checked them and knows others."""
    parser = argparse.ArgumentParser(prog="python -m bench peers")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", type=lambda text: text.split(",") if text else [])
    options, _ = parser.parse_known_args(arguments)
    keys = [section.key for section in SECTIONS]
    if unknown := [key for key in options.only if key not in keys]:
        parser.error(f"--only names {unknown[0]!r}, which is not a section. Choose from: {', '.join(keys)}.")
    return options


def _prepare(num_rows: int, sections: list[Section]) -> Workload:
    """Make the corpus, our indexes and the recorded orders."""
    work = make_corpora(num_rows)
    data = {system.options["data"] for section in sections for system in section.systems if "data" in system.options}
    for name in sorted(data | {"jsonl-10", "tokens"}):
        ours.build(work, name)
    ours.record_order(work, "jsonl-10", work.folder / "order-documents.npz")
    ours.record_order(work, "tokens", work.folder / "order-tokens.npz")
    return work


def _measure(section: Section, work: Workload, rounds: Rounds) -> dict[str, Any]:
    """Measure and print one section; return what the JSON file holds of it."""
    print(f"\n{section.title}. {section.text}", flush=True)
    measured = measure(section, work, rounds)
    print(aligned(table_rows(section.unit, measured)), flush=True)
    return {
        "key": section.key,
        "title": section.title,
        "text": section.text,
        "unit": section.unit,
        "systems": [asdict(system) for system in measured],
    }


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()} | _installed(Path(sys.executable), OUR_PACKAGES)
    for name, packages in PEERS.items():
        pinned = [package.partition("==")[0] for package in packages if "==" in package]
        # The table says why a system is missing.
        with contextlib.suppress(Missing):
            versions |= _installed(interpreter(name), pinned)
    return versions


def _installed(python: Path, packages: Any) -> dict[str, str]:
    program = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", program, *packages], capture_output=True, text=True, check=False)
    versions: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return versions


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
