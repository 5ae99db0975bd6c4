"""`mixtera-hpc query`: what a query selects, and how the domains of a mixture share it."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from mixtera_hpc.cli.run_or_overrides import add_run_or_overrides, find_run

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_or_overrides(parser, "query.where=... mixture.group_by=[source]")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--explain", action="store_true", help="say how the answer was found and what it took")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.cli.collection import compose_data
    from mixtera_hpc.dataplane.mixing.from_config import query_weights
    from mixtera_hpc.dataplane.reading.shared_index import select_subset
    from mixtera_hpc.dataplane.resume.run_identity import data_of_run
    from mixtera_hpc.dataplane.sample_subset import SampleSubset
    from mixtera_hpc.index.read.configured import open_configured

    began = time.perf_counter()
    folder = find_run(args)
    if folder is not None:
        config, subset = data_of_run(folder, args.split)
    else:
        config, subset = compose_data(args.overrides), SampleSubset(split=args.split)
    index = open_configured(config)
    open_s = time.perf_counter() - began
    with index:
        chosen = select_subset(config, index, subset)
    has_tokens = index.tables.has_tokens
    rows, tokens = chosen.selection.table.totals()
    weights = query_weights(config, chosen.keys, rows=rows, tokens=tokens if has_tokens else None)
    answer = _answer(chosen, weights, has_tokens)
    if args.explain:
        answer["explain"] = _explained(chosen, index.tables.num_samples, open_s)
    if args.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _print(answer, chosen.names)
    return 0


def _explained(chosen: Any, num_samples: int, open_s: float) -> dict[str, Any]:
    """The field `explain` of `query --explain --json`: every block is in one of its four counts."""
    effort, cost = chosen.selection.pruning, chosen.cost
    return {
        "where": chosen.selection.predicate.text,
        "numbers": sorted(chosen.selection.predicate.numbers),
        "blocks": effort.blocks,
        "pruned_by_histogram": effort.pruned_by_histogram,
        "pruned_by_zones": effort.pruned_by_zones,
        "whole": effort.decided_whole,
        "scanned": effort.scanned_blocks,
        "samples": num_samples,
        "samples_scanned": effort.scanned_samples,
        "bytes_read": cost.bytes_read,
        "open_s": open_s,
        "parse_s": cost.parse_s,
        "count_s": cost.count_s,
        "read_s": cost.read_s,
    }


def _answer(chosen: Any, weights: Any, has_tokens: bool) -> dict[str, Any]:
    """The fields of `query --json`."""
    from mixtera_hpc.core.domain_keys import domain_key_to_plain

    selection = chosen.selection
    rows, tokens = selection.table.totals()

    def counts(samples: int, tokens: int) -> dict[str, int | None]:
        return {"samples": int(samples), "tokens": int(tokens) if has_tokens else None}

    shares = [None] * len(chosen.keys) if weights is None else weights.tolist()
    domains = [
        {"domain_id": i, "key": domain_key_to_plain(key), **counts(rows[i], tokens[i]), "weight": shares[i]}
        for i, key in enumerate(chosen.keys)
    ]
    return {
        "selected": counts(*selection.selected),
        "domains": domains,
        "left_out": counts(*selection.unassigned),
        "overlaps": [{"domain_id": a, "also_matches": b, "samples": n} for a, b, n in selection.overlaps],
    }


def _print(answer: dict[str, Any], names: tuple[str, ...]) -> None:
    from rich.table import Table

    from mixtera_hpc.cli.console import open_console

    table = Table(title="domains", title_justify="left")
    for heading in ("id", "domain", "samples", "tokens", "weight"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, name in zip(answer["domains"], names, strict=True):
        weight = "—" if domain["weight"] is None else f"{domain['weight']:.4f}"
        table.add_row(str(domain["domain_id"]), name, _count(domain["samples"]), _count(domain["tokens"]), weight)
    console = open_console()
    console.print(table)
    for what, counts in (("selected", answer["selected"]), ("in no domain", answer["left_out"])):
        console.print(f"{what}: {_count(counts['samples'])} samples, {_count(counts['tokens'])} tokens")
    for overlap in answer["overlaps"]:
        first, other = names[overlap["domain_id"]], names[overlap["also_matches"]]
        console.print(
            f"{_count(overlap['samples'])} samples of {first} match {other} too; the first key has them",
        )
    if "explain" in answer:
        _print_explained(console, answer["explain"])


def _print_explained(console: "Console", found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="blocks", title_justify="left", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left")
    for what, meaning in _BLOCKS.items():
        table.add_row(what.replace("_", " "), _count(found[what]), meaning)
    console.print(table)
    numbers = ", ".join(found["numbers"]) or "no number"
    console.print(
        f"looked at {numbers} of {_count(found['samples_scanned'])} of {_count(found['samples'])} samples: "
        f"{found['bytes_read'] / 1e6:.1f} MB of columns",
    )
    stages = {name.removesuffix("_s"): found[name] for name in ("open_s", "parse_s", "count_s", "read_s")}
    console.print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items()))


_BLOCKS = {
    "blocks": "all there are",
    "pruned_by_histogram": "no combination of categories in them can match",
    "pruned_by_zones": "their smallest and largest numbers rule them out",
    "whole": "decided without looking at a sample",
    "scanned": "their samples were looked at",
}


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"
