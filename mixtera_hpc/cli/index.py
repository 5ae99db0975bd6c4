"""`mixtera-hpc index build|inspect|verify`: the property index of a data collection."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.comm.communicator import Communicator
    from mixtera_hpc.index.build import BuildProgress, BuildReport
    from mixtera_hpc.index.open import PropertyIndex

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=sorted(_ACTIONS), help="build one (also under mpiexec or srun), show it, compare it"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. data.root=DIR dataplane.tokenizer=FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    return _ACTIONS[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from mixtera_hpc.comm.launch import guarded, open_communicator

    comm = open_communicator()
    return guarded(comm, lambda: _build_here(args, comm))


def _build_here(args: argparse.Namespace, comm: "Communicator") -> None:
    from mixtera_hpc.cli.collection import compose_data
    from mixtera_hpc.index.build import build_index

    config = compose_data(args.overrides)
    with _progress(comm.rank == 0 and sys.stderr.isatty()) as progress:
        report = build_index(config, comm, progress)
    if comm.rank == 0:
        _print_report(report, args.json)


@contextlib.contextmanager
def _progress(shown: bool) -> "Iterator[Callable[[BuildProgress], None] | None]":
    """A bar on stderr: bytes, rate and rows of this rank's share."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    rows = TextColumn("{task.fields[rows]:,} rows")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), rows, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scan", total=None, rows=0)

        def show(state: "BuildProgress") -> None:
            bar.update(task, completed=state.bytes_done, total=state.bytes_total, rows=state.rows)

        yield show


def _print_report(report: "BuildReport", as_json: bool) -> None:
    if as_json:
        import msgspec

        print(msgspec.json.encode(report).decode())
        return
    rate = report.bytes_read / max(report.elapsed_s, 1e-9) / 1e6
    print(f"{report.path}: {report.samples:,} samples of {report.shards:,} shards in {report.blocks:,} blocks")
    print(f"  read {report.bytes_read / 1e6:,.1f} MB in {report.elapsed_s:.1f} s ({rate:,.0f} MB/s)")
    if report.resumed_units:
        print(f"  {report.resumed_units} of {report.units} units were found from a build that was interrupted")
    print(f"  {report.index_bytes:,} bytes, {report.index_bytes / report.samples:.2f} per sample")
    if report.tokens is None:
        print("  tokens were not counted; mixture.unit=tokens needs them: build with dataplane.tokenizer=FILE")
    else:
        print(f"  {report.tokens:,} tokens")
    for name in report.empty_properties:
        print(f"  no sample has a value of {name}: is data.properties.{name} the right path?")


def _inspect(args: argparse.Namespace) -> int:
    from mixtera_hpc.cli.collection import open_collection

    _, index = open_collection(args.overrides)
    with index:
        facts = _facts(index)
        if args.json:
            print(json.dumps(facts, ensure_ascii=False))
        else:
            _print_facts(index, facts)
    return 0


def _facts(index: "PropertyIndex") -> dict[str, Any]:
    """The fields of `index inspect --json`."""
    tables = index.tables
    size = index.path.stat().st_size
    return {
        "shards": len(tables.shards.path),
        "samples": tables.num_samples,
        "tokens": int(tables.blocks.tokens.sum()) if tables.has_tokens else None,
        "blocks": len(tables.blocks),
        "bytes": size,
        "bytes_per_sample": size / tables.num_samples,
        "properties": {p.name: {"kind": str(p.kind), "values": list(p.values)} for p in tables.properties.values()},
        "fingerprint": index.fingerprint,
        "tokenizer": index.tokenizer_fingerprint,
        "data_root": str(index.data_root),
        "text": index.text,
    }


def _print_facts(index: "PropertyIndex", facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tokens = f"{facts['tokens']:,} tokens" if facts["tokens"] is not None else "tokens not counted"
    console.print(f"{index.path}: {facts['samples']:,} samples, {tokens}", highlight=False)
    console.print(
        f"  {facts['shards']:,} shards below {facts['data_root']}, {facts['blocks']:,} blocks", highlight=False
    )
    console.print(f"  {facts['bytes']:,} bytes, {facts['bytes_per_sample']:.2f} per sample", highlight=False)
    table = Table("property", "kind", "values", "most frequent")
    for name, described in facts["properties"].items():
        table.add_row(name, described["kind"], *_described(index, name))
    if facts["properties"]:
        console.print(table)


def _described(index: "PropertyIndex", name: str) -> tuple[str, str]:
    """Number of values, and the most frequent ones or the range of a number."""
    import numpy as np

    tables = index.tables
    if name in tables.blocks.zones:
        zones = tables.blocks.zones[name]
        known = zones.low[~np.isnan(zones.low)], zones.high[~np.isnan(zones.high)]
        return "", f"{known[0].min():g} to {known[1].max():g}" if len(known[0]) else "none"
    rows = np.bincount(tables.histogram.combo, tables.histogram.rows, tables.combos.num_combos)
    per_code = np.repeat(rows, np.diff(tables.combos.indptr[name]))
    values = tables.properties[name].values
    counts = np.bincount(tables.combos.codes[name], per_code, len(values))
    top = np.argsort(-counts, kind="stable")[:5]
    shown = [f"{values[i]} ({int(counts[i]):,})" for i in top] + (["…"] if len(values) > 5 else [])
    return f"{len(values):,}", ", ".join(shown)


def _verify(args: argparse.Namespace) -> int:
    from mixtera_hpc.cli.collection import open_collection
    from mixtera_hpc.index.verify import changed_shards, check_fresh

    _, index = open_collection(args.overrides)
    with index:
        if args.json:
            changed = changed_shards(index)
            print(
                json.dumps({"fresh": not changed, "changed": [{"path": c.path, "problem": c.problem} for c in changed]})
            )
            return 2 if changed else 0
        check_fresh(index)
        print(
            f"{index.path}: all {len(index.tables.shards.path):,} shards below {index.data_root} are as they were indexed"
        )
    return 0


_ACTIONS = {"build": _build, "inspect": _inspect, "verify": _verify}
