"""Write docs/peers.md from bench/out/peers.json: `python -m bench._peers.page`."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._peers.goals import goal_rows
from bench._peers.ratios import table_rows
from bench._peers.rounds import Measured
from bench._results import OUT

__all__ = ["aligned", "write_page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peers.md"
INTRODUCTION = (
    "# Peers",
    "`python -m bench peers` measures Mixtera-HPC next to other systems and to bare loops, and writes this page. It "
    "installs every system in an environment of its own, and makes one corpus for all: {num_rows:,} rows with the "
    "fields of SlimPajama, seven domains in its proportions in random order, 1 kB or about 250 tokens per row, in the "
    "page cache.",
    "**Mixtera-HPC** is `DataPlane` as a training script opens it, with default settings but for the sizes of batches. "
    "It shuffles rows, mixes domains exactly, and can resume at any step. The column *order* says what the others do. "
    "None of the others mixes domains, except for Megatron-core.",
    "**A round** is {cpu_s:g} s of CPU time of one system. Systems take turns, so they meet the same other load. The "
    "number of rounds is {rounds}, after one that is not counted. Each system is a process on one core, with at "
    "most 1,024 open files. CPU time is that of all its threads and child processes.",
    "**Values** are the median of the rounds, with the smallest and the largest in parentheses. Ratios are formed "
    "round by round. Compare ratios: absolute rates depend on the machine and its load.",
)
WIDTH = 120


def write_page(content: dict[str, Any]) -> None:
    """Write the page of a complete run."""
    parts = [paragraph.format(**content["settings"]) for paragraph in INTRODUCTION]
    parts.append(_origin(content))
    by_section = {section["key"]: [Measured(**s) for s in section["systems"]] for section in content["sections"]}
    parts += ["## Goals", "The ratios that [the design](design.md#12-performance-goals) sets goals for:"]
    parts.append(aligned(goal_rows(by_section), markdown=True))
    for section in content["sections"]:
        measured = by_section[section["key"]]
        parts += [f"## {section['title']}", section["text"]]
        parts.append(aligned(table_rows(section["unit"], measured), markdown=True))
        parts += [f"{system.name} was not run: {system.reason}." for system in measured if not system.rates]
    # Tables keep their lines, texts are wrapped.
    filled = [part if part.startswith("|") else textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in parts]
    PAGE.write_text("\n\n".join(filled) + "\n")


def _origin(content: dict[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    is_busy = machine["load"] > machine["cores"] / 2
    load = "The machine was busy with other work. " if is_busy else ""
    return (
        f"Measured on {content['date']} with commit {content['commit']} on {machine['cores']} cores of "
        f"{machine['cpu']}, in {content['minutes']:.0f} minutes. {load}Load average at the start: "
        f"{machine['load']:.1f}. Versions: {versions}."
    )


def aligned(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Return a table with columns of equal width; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    separator = " | " if markdown else "  "
    lines = [separator.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if markdown:
        lines.insert(1, separator.join("-" * width for width in widths))
        lines = [f"| {line} |" for line in lines]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    write_page(json.loads((OUT / "peers.json").read_text()))
