"""Describe an index, and what a build, refresh or derivation did, as text and as JSON fields."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mixtera_hpc.cli.answers.store_text import row_store_line, store_line
from mixtera_hpc.cli.console import open_console
from mixtera_hpc.errors import list_names, pluralize
from mixtera_hpc.index.build.assemble import BuildReport
from mixtera_hpc.index.build.derive import DeriveReport
from mixtera_hpc.index.build.refresh import RefreshReport
from mixtera_hpc.index.read.duplicates import DuplicateReport
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.stored_sizes import column_sizes

__all__ = ["build_lines", "derive_lines", "duplicate_lines", "index_facts", "print_facts", "refresh_lines"]

MAX_LISTED = 5
"""Shards, values or columns listed before the rest is only counted."""


def build_lines(report: BuildReport) -> list[str]:
    """Describe a build."""
    lines = [
        f"{report.path}: {pluralize(report.samples, 'sample')} of {pluralize(report.shards, 'shard')} in "
        f"{pluralize(report.blocks, 'block')}",
        _rate_line(report.bytes_read, report.elapsed_s),
    ]
    if report.resumed_units:
        lines.append(f"  {report.resumed_units} of {report.units} scan units were taken from an interrupted build")
    lines.append(f"  {report.index_bytes:,} bytes, {report.index_bytes / report.samples:.2f} per sample")
    if report.tokens is None:
        lines.append("  tokens were not counted; mixture.unit=tokens needs them: build with dataplane.tokenizer=FILE")
    else:
        lines.append(f"  {report.tokens:,} tokens")
    if report.token_store is not None:
        lines.append(f"  {store_line(report.token_store)}")
    if report.row_store is not None:
        lines.append(f"  {row_store_line(report.row_store)}")
    skipped = _skipped(report)
    if skipped:
        lines.append(f"  skipped: {', '.join(skipped)}; mixtera-hpc index inspect lists them")
    if report.empty_shards:
        listed = list_names(report.empty_shards, MAX_LISTED)
        lines.append(f"  {pluralize(len(report.empty_shards), 'shard')} without rows: {listed}")
    for dataset, shares in report.null_shares.items():
        if shares:
            listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            lines.append(f"  null{f' in {dataset}' if dataset else ''}: {listed}")
    for name in report.empty_properties:
        lines.append(f"  no sample has a value of {name}: is data.properties.{name} the right path?")
    return lines


def _rate_line(bytes_read: int, elapsed_s: float) -> str:
    rate = bytes_read / max(elapsed_s, 1e-9) / 1e6
    return f"  read {bytes_read / 1e6:,.1f} MB in {elapsed_s:.1f} s ({rate:,.0f} MB/s)"


def _skipped(report: BuildReport) -> list[str]:
    skipped = []
    if report.bad_rows:
        skipped.append(f"{pluralize(report.bad_rows, 'row')} that cannot be read")
    if report.damaged_shards:
        skipped.append(f"the damaged end of {pluralize(report.damaged_shards, 'shard')}")
    return skipped


def refresh_lines(report: RefreshReport) -> list[str]:
    """Describe a refresh."""
    if report.build is None and not report.touched:
        return [f"nothing has changed in {pluralize(report.unchanged, 'shard')}; the index was not rewritten"]
    touched = f"{pluralize(len(report.touched), 'shard')} with the same content got new modification times in the index"
    if report.build is None:
        return [f"no content has changed in {pluralize(report.unchanged, 'shard')}; {touched}; saved states stay valid"]
    lines = [f"  {pluralize(report.unchanged, 'shard')} unchanged"]
    for what, paths in (("added", report.added), ("changed", report.changed), ("deleted", report.deleted)):
        if paths:
            lines.append(f"  {len(paths):,} {what}: {list_names(paths, MAX_LISTED)}")
    if report.touched:
        lines.append(f"  {touched}")
    if report.token_store is not None:
        lines.append(f"  {store_line(report.token_store)}")
    if report.row_store is not None:
        lines.append(f"  {row_store_line(report.row_store)}")
    if report.generations:
        known = ", ".join(fingerprint[:12] for fingerprint in report.generations)
        lines.append(
            "  runs of earlier generations continue with the generation that they began with; your own loop selects "
            f"one with index.generations, one of: {known}"
        )
    else:
        lines.append("  runs that used this index cannot continue: shards that they read were changed or deleted")
    return [*build_lines(report.build), *lines]


def derive_lines(report: DeriveReport) -> list[str]:
    """Describe a derivation."""
    lines = [
        f"{report.path}: added {', '.join(report.derived)} to {pluralize(report.samples, 'sample')}, "
        f"{pluralize(report.combos, 'combo')} now",
        _rate_line(report.bytes_read, report.elapsed_s),
    ]
    if report.resumed_units:
        lines.append(f"  {report.resumed_units} of {report.units} scan units were taken from an interrupted derivation")
    return lines + [f"  every value of {name} is null" for name in report.empty_properties]


def duplicate_lines(report: DuplicateReport) -> list[str]:
    """Describe the duplicates of an index."""
    lines = [
        f"{pluralize(report.duplicates, 'sample')} of {sum(report.samples):,} repeat an earlier one: "
        f"{pluralize(report.groups, 'document')} occur more than once"
    ]
    names = [name or "all" for name in report.datasets]
    for name, samples, within in zip(names, report.samples, report.within, strict=True):
        lines.append(f"  {name}: {within:,} of {pluralize(samples, 'sample')} repeat an earlier one of it")
    for first, row in zip(names, report.shared, strict=True):
        lines += [
            f"  {pluralize(count, 'sample')} of {second} have a document that is in {first} too"
            for second, count in zip(names, row, strict=True)
            if count
        ]
    for places in report.examples:
        lines.append(f"    equal: {list_names([f'{shard} row {row}' for shard, row in places], MAX_LISTED)}")
    return lines


def index_facts(index: PropertyIndex) -> dict[str, Any]:
    """Return the fields of `index inspect --json`."""
    tables = index.tables
    files = [Path(source.path) for source in index.sample_sources()]
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
        "sources": dict(index.sources),
        "roots": {name: str(root) for name, root in index.roots.items()},
        "sets": {name: {"text": facts.text, "parser": facts.parser} for name, facts in index.sets.items()},
        "columns": {c.name: {"bytes": c.size_bytes, "unpacked_bytes": c.unpacked_bytes} for c in columns},
        "bad": [{"shard": paths[b.shard], "reason": b.reason, "rows": b.rows} for b in index.bad],
        "generations": [g.fingerprint for g in index.generations],
    }


def print_facts(index: PropertyIndex, facts: dict[str, Any]) -> None:
    """Print the fields of `index_facts` as text and a table."""
    console = open_console(soft_wrap=True)
    tokens = f"{facts['tokens']:,} tokens" if facts["tokens"] is not None else "tokens not counted"
    console.print(f"{index.path}: {pluralize(facts['samples'], 'sample')}, {tokens}")
    console.print(f"  {_shards_text(facts)}, {_block_sizes(index)}")
    console.print(f"  {facts['bytes']:,} bytes, {facts['bytes_per_sample']:.2f} per sample{_largest_columns(facts)}")
    console.print(f"  fingerprint {facts['fingerprint']}{_earlier_generations(facts)}")
    table = Table("property", "kind", "from", "values", "most frequent")
    for name, described in facts["properties"].items():
        table.add_row(name, described["kind"], index.sources.get(name, ""), *_values_text(index, name))
    if facts["properties"]:
        open_console().print(table)
    for line in _bad_lines(facts):
        console.print(line)


def _shards_text(facts: dict[str, Any]) -> str:
    formats = ", ".join(f"{count:,} {name}" for name, count in facts["formats"].items())
    size = f"{facts['data_bytes'] / 1e6:,.1f} MB"
    return f"{pluralize(facts['shards'], 'shard')} ({formats}) of {size} below {facts['data_root']}"


def _block_sizes(index: PropertyIndex) -> str:
    rows = index.tables.blocks.rows
    sizes = f"{int(rows.min()):,} to {int(rows.max()):,} rows, median {np.median(rows):,.0f}"
    return f"{pluralize(len(rows), 'block')} of {sizes}"


def _largest_columns(facts: dict[str, Any]) -> str:
    """Return the sizes of the largest columns, compressed and not."""
    columns = sorted(facts["columns"].items(), key=lambda item: -item[1]["bytes"])[:4]
    sizes = [f"{name} {size['bytes']:,} (of {size['unpacked_bytes']:,})" for name, size in columns]
    return f"; largest: {', '.join(sizes)}" if sizes else ""


def _earlier_generations(facts: dict[str, Any]) -> str:
    earlier = [fingerprint[:12] for fingerprint in facts["generations"] if fingerprint != facts["fingerprint"]]
    return f", earlier generations {', '.join(earlier)}" if earlier else ""


def _bad_lines(facts: dict[str, Any]) -> list[str]:
    """List the skipped rows, the shards with the most first."""
    bad = sorted(facts["bad"], key=lambda b: -b["rows"])
    if not bad:
        return []
    listed = bad[: 2 * MAX_LISTED]
    rows = sum(b["rows"] for b in bad)
    shards = len({b["shard"] for b in bad})
    lines = [f"  skipped: {pluralize(rows, 'row')} of {pluralize(shards, 'shard')} that cannot be read"]
    lines += [f"    {b['shard']}: {b['rows'] or 'the rest'}, {b['reason']}" for b in listed]
    if len(bad) > len(listed):
        lines.append(f"    and {len(bad) - len(listed):,} more (--json lists all)")
    return lines


def _values_text(index: PropertyIndex, name: str) -> tuple[str, str]:
    """Return the number of values of a property and the most frequent ones, or the range of a number."""
    zones = index.tables.blocks.zones.get(name)
    if zones is None:
        return _frequent_values(index, name)
    low = zones.low[~np.isnan(zones.low)]
    high = zones.high[~np.isnan(zones.high)]
    return "", f"{low.min():g} to {high.max():g}" if len(low) else "none"


def _frequent_values(index: PropertyIndex, name: str) -> tuple[str, str]:
    tables = index.tables
    values = tables.properties[name].values
    # Rows per combo, repeated for each value that the combo has, then added up per value.
    rows_of_combo = np.bincount(tables.histogram.combo, tables.histogram.rows, tables.combos.num_combos)
    rows_of_code = np.repeat(rows_of_combo, np.diff(tables.combos.indptr[name]))
    counts = np.bincount(tables.combos.codes[name], rows_of_code, len(values))
    top = np.argsort(-counts, kind="stable")[:MAX_LISTED]
    listed = [f"{values[i]} ({int(counts[i]):,})" for i in top]
    if len(values) > MAX_LISTED:
        listed.append("…")
    return f"{len(values):,}", ", ".join(listed)
