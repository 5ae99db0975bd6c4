"""Evaluate the query of a configuration or of a run, and print the answer."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.cli.console import open_console
from mixtera_hpc.cli.run_or_overrides import find_optional_run
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import domain_key_to_plain
from mixtera_hpc.dataplane.mixing.subset_counts import count_subset
from mixtera_hpc.dataplane.resume.run_identity import data_of_run
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.selection import SelectedDomains

__all__ = ["print_answer"]

_BLOCK_COUNTS = {
    "blocks": "all blocks",
    "pruned_by_histogram": "no combination of categories in them can match",
    "pruned_by_zones": "their smallest and largest numbers rule them out",
    "whole": "decided without reading a sample",
    "scanned": "their samples were read",
}
"""Counts of `query --explain`, and what they mean."""


def print_answer(args: argparse.Namespace) -> None:
    """Open the index, select the domains, and print them."""
    began_s = time.perf_counter()
    config, subset = _config_and_subset(args)
    index = open_configured(config, reads_shards=False)
    open_s = time.perf_counter() - began_s
    with index:
        counts = count_subset(config, index, subset)

    tables = index.tables
    selected = counts.domains
    answer = _answer_fields(selected, counts.weights, tables.has_tokens)
    if args.explain:
        answer["explain"] = _explain_fields(selected, tables.num_samples, open_s)
    if args.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _print_tables(answer, selected.names)


def _config_and_subset(args: argparse.Namespace) -> tuple[Config, SampleSubset]:
    """Return the configuration of a run and the samples it still serves, or what the overrides say."""
    folder = find_optional_run(args)
    if folder is not None:
        return data_of_run(folder, args.split)
    return compose_data(args.overrides), SampleSubset(split=args.split)


def _answer_fields(selected: SelectedDomains, weights: NDArray[np.float64] | None, has_tokens: bool) -> dict[str, Any]:
    """Return the fields of `query --json`."""
    selection = selected.selection
    rows, tokens = selection.table.totals()

    def counts(num_samples: int, num_tokens: int) -> dict[str, int | None]:
        return {"samples": int(num_samples), "tokens": int(num_tokens) if has_tokens else None}

    shares = [None] * len(selected.keys) if weights is None else weights.tolist()
    domains = [
        {"domain_id": i, "key": domain_key_to_plain(key), **counts(rows[i], tokens[i]), "weight": shares[i]}
        for i, key in enumerate(selected.keys)
    ]
    return {
        "selected": counts(*selection.selected),
        "domains": domains,
        "left_out": counts(*selection.unassigned),
        "overlaps": [
            {"domain_id": first, "also_matches": other, "samples": count} for first, other, count in selection.overlaps
        ],
    }


def _explain_fields(selected: SelectedDomains, num_samples: int, open_s: float) -> dict[str, Any]:
    """Return the field `explain` of `query --explain --json`. Every block is in one of its four counts."""
    pruning = selected.selection.pruning
    cost = selected.cost
    return {
        "where": selected.selection.predicate.text,
        "numbers": sorted(selected.selection.predicate.numbers | selected.selection.assignment.numbers),
        "blocks": pruning.blocks,
        "pruned_by_histogram": pruning.pruned_by_histogram,
        "pruned_by_zones": pruning.pruned_by_zones,
        "whole": pruning.decided_whole,
        "scanned": pruning.scanned_blocks,
        "samples": num_samples,
        "samples_scanned": pruning.scanned_samples,
        "bytes_read": cost.bytes_read,
        "open_s": open_s,
        "parse_s": cost.parse_s,
        "count_s": cost.count_s,
        "read_s": cost.read_s,
    }


def _print_tables(answer: dict[str, Any], names: Sequence[str]) -> None:
    console = open_console()
    console.print(_domain_table(answer, names))
    for what, counts in (("selected", answer["selected"]), ("in no domain", answer["left_out"])):
        console.print(f"{what}: {_count(counts['samples'])} samples, {_count(counts['tokens'])} tokens")
    for overlap in answer["overlaps"]:
        first = names[overlap["domain_id"]]
        other = names[overlap["also_matches"]]
        console.print(f"{_count(overlap['samples'])} samples of {first} also match {other}; the first key takes them")
    if "explain" in answer:
        _print_explain(console, answer["explain"])


def _domain_table(answer: dict[str, Any], names: Sequence[str]) -> Table:
    table = Table(title="domains", title_justify="left")
    for heading in ("id", "domain", "samples", "tokens", "weight"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, name in zip(answer["domains"], names, strict=True):
        weight = "—" if domain["weight"] is None else f"{domain['weight']:.4f}"
        table.add_row(str(domain["domain_id"]), name, _count(domain["samples"]), _count(domain["tokens"]), weight)
    return table


def _print_explain(console: Console, explain: dict[str, Any]) -> None:
    table = Table(title="blocks", title_justify="left", show_header=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for what, meaning in _BLOCK_COUNTS.items():
        table.add_row(what.replace("_", " "), _count(explain[what]), meaning)
    console.print(table)
    numbers = ", ".join(explain["numbers"]) or "no number"
    console.print(
        f"read {numbers} of {_count(explain['samples_scanned'])} of {_count(explain['samples'])} samples: "
        f"{explain['bytes_read'] / 1e6:.1f} MB of columns",
    )
    seconds = {stage: explain[f"{stage}_s"] for stage in ("open", "parse", "count", "read")}
    console.print(", ".join(f"{stage} {value:.3f} s" for stage, value in seconds.items()))


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"
