"""What the index verbs say: progress of all ranks, reports, and what an index holds."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mixtera_hpc.cli.console import open_console, pluralize

if TYPE_CHECKING:
    from mixtera_hpc.comm.communicator import Communicator
    from mixtera_hpc.index.build.assemble import BuildReport
    from mixtera_hpc.index.build.derive import DeriveReport
    from mixtera_hpc.index.build.refresh import RefreshReport
    from mixtera_hpc.index.read.open import PropertyIndex
    from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanProgress

__all__ = ["build_text", "derive_text", "facts_of", "print_facts", "progress", "refresh_text"]

LINE_EVERY_S = 10.0
NAMED = 5


@contextlib.contextmanager
def progress(comm: "Communicator") -> "Iterator[ProgressCallback | None]":
    """A bar on a terminal, a line every ten seconds elsewhere; of all ranks together, on standard error of rank 0."""
    if comm.rank > 0:
        yield None
    elif not sys.stderr.isatty():
        yield _Lines(comm.size)
    else:
        yield from _bar(comm.size)


class _Lines:
    """What a batch log gets."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks = pluralize(num_ranks, "rank")
        self._began_s = self._told_s = 0.0

    def __call__(self, state: "ScanProgress") -> None:
        now = time.monotonic()
        if not self._began_s:
            self._began_s = self._told_s = now
        if now - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now
        rate = state.bytes_done / (now - self._began_s)
        left_s = (state.bytes_total - state.bytes_done) / rate if rate else 0.0
        share = state.bytes_done / max(state.bytes_total, 1)
        sys.stderr.write(
            f"{time.strftime('%H:%M:%S')} {share:4.0%} of {state.bytes_total / 1e9:,.1f} GB, {state.rows:,} rows, "
            f"{rate / 1e6:,.0f} MB/s on {self._ranks}, {left_s / 60:,.1f} minutes left\n"
        )
        sys.stderr.flush()


def _bar(num_ranks: int) -> "Iterator[ProgressCallback]":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    rows = TextColumn("{task.fields[rows]:,} rows" + (f" on {num_ranks} ranks" if num_ranks > 1 else ""))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), rows, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scan", total=None, rows=0)

        def show(state: "ScanProgress") -> None:
            bar.update(task, completed=state.bytes_done, total=state.bytes_total, rows=state.rows)

        yield show


def build_text(report: "BuildReport") -> list[str]:
    """What a build did."""
    rate = report.bytes_read / max(report.elapsed_s, 1e-9) / 1e6
    lines = [
        f"{report.path}: {pluralize(report.samples, 'sample')} of {pluralize(report.shards, 'shard')} in "
        f"{pluralize(report.blocks, 'block')}",
        f"  read {report.bytes_read / 1e6:,.1f} MB in {report.elapsed_s:.1f} s ({rate:,.0f} MB/s)",
    ]
    if report.resumed_units:
        lines.append(f"  {report.resumed_units} of {report.units} units were found from a build that was interrupted")
    lines.append(f"  {report.index_bytes:,} bytes, {report.index_bytes / report.samples:.2f} per sample")
    if report.tokens is None:
        lines.append("  tokens were not counted; mixture.unit=tokens needs them: build with dataplane.tokenizer=FILE")
    else:
        lines.append(f"  {report.tokens:,} tokens")
    left_out = []
    if report.bad_rows:
        left_out.append(f"{pluralize(report.bad_rows, 'row')} that cannot be read")
    if report.damaged_shards:
        left_out.append(f"what follows the damage in {pluralize(report.damaged_shards, 'shard')}")
    if left_out:
        lines.append(f"  left out: {', '.join(left_out)}; mixtera-hpc index inspect names them")
    for name in report.empty_properties:
        lines.append(f"  no sample has a value of {name}: is data.properties.{name} the right path?")
    return lines


def refresh_text(report: "RefreshReport") -> list[str]:
    """What a refresh did."""
    if report.build is None:
        return [f"nothing has changed in {pluralize(report.kept, 'shard')}; the index was left alone"]
    lines = [f"  {pluralize(report.kept, 'shard')} kept"]
    for what, paths in (("added", report.added), ("changed", report.changed), ("deleted", report.deleted)):
        if paths:
            more = f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
            lines.append(f"  {len(paths):,} {what}: {', '.join(paths[:NAMED])}{more}")
    if report.generations:
        known = ", ".join(fingerprint[:12] for fingerprint in report.generations)
        lines.append(
            f"  runs of the states before go on by themselves, scripts of yours with index.generation set to one of: {known}"
        )
    else:
        lines.append("  runs that used the index before cannot go on with it: shards they used are no longer the same")
    return [*build_text(report.build), *lines]


def derive_text(report: "DeriveReport") -> list[str]:
    """What a derivation did."""
    rate = report.bytes_read / max(report.elapsed_s, 1e-9) / 1e6
    lines = [
        f"{report.path}: {', '.join(report.derived)} of {pluralize(report.samples, 'sample')}, {pluralize(report.combos, 'combo')} now",
        f"  read {report.bytes_read / 1e6:,.1f} MB in {report.elapsed_s:.1f} s ({rate:,.0f} MB/s)",
    ]
    if report.resumed_units:
        lines.append(
            f"  {report.resumed_units} of {report.units} units were found from an attempt that was interrupted"
        )
    return lines + [f"  every value of {name} is null" for name in report.empty_properties]


def facts_of(index: "PropertyIndex") -> dict[str, Any]:
    """The fields of `index inspect --json`."""
    from pathlib import Path

    from mixtera_hpc.index.read.joined import sample_sources
    from mixtera_hpc.index.read.stored_sizes import column_sizes

    tables = index.tables
    files = [Path(source.path) for source in sample_sources(index)]
    columns = column_sizes(files[0]) if len(files) == 1 else []
    size = sum(path.stat().st_size for path in files)
    paths = index.shard_paths()
    return {
        "shards": len(tables.shards.path),
        "samples": tables.num_samples,
        "tokens": int(tables.histogram.tokens.sum()) if tables.has_tokens else None,
        "blocks": len(tables.blocks),
        "bytes": size,
        "bytes_per_sample": size / tables.num_samples,
        "properties": {p.name: {"kind": str(p.kind), "values": list(p.values)} for p in tables.properties.values()},
        "fingerprint": index.fingerprint,
        "tokenizer": index.tokenizer_fingerprint,
        "data_root": str(index.data_root),
        "text": index.text,
        "formats": dict(Counter(tables.shards.format)),
        "data_bytes": int(tables.shards.size_bytes.sum()),
        "combos": tables.combos.num_combos,
        "sources": index.sources,
        "roots": {name: str(root) for name, root in index.roots.items()},
        "columns": {c.name: {"bytes": c.size_bytes, "unpacked_bytes": c.unpacked_bytes} for c in columns},
        "bad": [{"shard": paths[b.shard], "reason": b.reason, "rows": b.rows} for b in index.bad],
        "generations": [g.fingerprint for g in index.generations],
    }


def print_facts(index: "PropertyIndex", facts: dict[str, Any]) -> None:
    """The same, for people."""
    from rich.table import Table

    console = open_console(soft_wrap=True)
    tokens = f"{facts['tokens']:,} tokens" if facts["tokens"] is not None else "tokens not counted"
    console.print(f"{index.path}: {pluralize(facts['samples'], 'sample')}, {tokens}")
    formats = ", ".join(f"{count:,} {name}" for name, count in facts["formats"].items())
    data = f"{pluralize(facts['shards'], 'shard')} ({formats}) of {facts['data_bytes'] / 1e6:,.1f} MB below {facts['data_root']}"
    console.print(f"  {data}, {_block_sizes(index)}")
    console.print(f"  {facts['bytes']:,} bytes, {facts['bytes_per_sample']:.2f} per sample{_packing(facts)}")
    console.print(f"  fingerprint {facts['fingerprint']}{_earlier(facts)}")
    table = Table("property", "kind", "from", "values", "most frequent")
    for name, described in facts["properties"].items():
        table.add_row(name, described["kind"], index.sources.get(name, ""), *_described(index, name))
    if facts["properties"]:
        open_console().print(table)
    for line in _bad_lines(facts):
        console.print(line)


def _block_sizes(index: "PropertyIndex") -> str:
    import numpy as np

    rows = index.tables.blocks.rows
    return f"{pluralize(len(rows), 'block')} of {int(rows.min()):,} to {int(rows.max()):,} rows, {np.median(rows):,.0f} usually"


def _packing(facts: dict[str, Any]) -> str:
    """How much the largest columns take, and what compression saves."""
    columns = sorted(facts["columns"].items(), key=lambda item: -item[1]["bytes"])[:4]
    told = [f"{name} {c['bytes']:,} (of {c['unpacked_bytes']:,})" for name, c in columns]
    return f"; largest: {', '.join(told)}" if told else ""


def _earlier(facts: dict[str, Any]) -> str:
    known = [fingerprint[:12] for fingerprint in facts["generations"] if fingerprint != facts["fingerprint"]]
    return f", begins with {', '.join(known)}" if known else ""


def _bad_lines(facts: dict[str, Any]) -> list[str]:
    """Skipped rows, the worst shards first."""
    bad = sorted(facts["bad"], key=lambda b: -b["rows"])
    if not bad:
        return []
    rows = sum(b["rows"] for b in bad)
    shards = len({b["shard"] for b in bad})
    lines = [f"  left out: {pluralize(rows, 'row')} of {pluralize(shards, 'shard')}, which cannot be read"]
    lines += [f"    {b['shard']}: {b['rows'] or 'the rest'}, {b['reason']}" for b in bad[: 2 * NAMED]]
    return lines + ([f"    and {len(bad) - 2 * NAMED:,} more (--json has all)"] if len(bad) > 2 * NAMED else [])


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
    top = np.argsort(-counts, kind="stable")[:NAMED]
    shown = [f"{values[i]} ({int(counts[i]):,})" for i in top] + (["…"] if len(values) > NAMED else [])
    return f"{len(values):,}", ", ".join(shown)
