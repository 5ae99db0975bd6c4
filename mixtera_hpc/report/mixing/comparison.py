"""Several runs side by side: losses and weights of every domain, and the parents of forked runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import msgspec
import numpy as np
from rich.table import Table

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.html_page import page_text, table_text
from mixtera_hpc.report.number_format import MISSING, format_loss, format_share
from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import RunSummary, summarize_run

__all__ = ["RunComparison", "compare_runs", "comparison_page", "comparison_text"]

MAX_ROWS = 50
"""Domains in the table, those with the largest difference first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Runs over the same domains."""

    names: Sequence[str]
    origins: Sequence[str]
    """Parent and step of each run that was forked; empty for the others."""
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Quantity or domain, then one value per run."""


def compare_runs(runs: Sequence[RunMetrics]) -> RunComparison:
    """Return the numbers of several runs side by side; domains with the largest difference of losses come first."""
    summaries = [summarize_run(metrics) for metrics in runs]
    names = [summary.run_id for summary in summaries]
    rows: list[list[str]] = [
        ["steps", *(str(summary.steps) for summary in summaries)],
        ["loss", *(format_loss(summary.loss_last, 3) for summary in summaries)],
        ["held-out loss", *(format_loss(summary.held_out_loss, 3) for summary in summaries)],
    ]
    domains = list(dict.fromkeys(domain.name for summary in summaries for domain in summary.domains))
    for name in sorted(domains, key=lambda name: -_spread(summaries, name))[:MAX_ROWS]:
        rows.append([f"{name}: loss", *(_value(summary, name) for summary in summaries)])
        rows.append([f"{name}: served, last weight", *(_weight(summary, name) for summary in summaries)])
    return RunComparison(
        names=names, origins=[_origin(metrics.run) for metrics in runs], headings=["", *names], rows=rows
    )


def comparison_text(comparison: RunComparison) -> Table:
    """Return the comparison as a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in comparison.headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for row in comparison.rows:
        table.add_row(*row)
    return table


def comparison_page(comparison: RunComparison) -> str:
    """Return the comparison as one self-contained HTML page."""
    rows = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in comparison.rows]
    origins = "".join(
        f"<p>{escape(name)}: {escape(origin)}</p>"
        for name, origin in zip(comparison.names, comparison.origins, strict=True)
        if origin
    )
    body = [
        f'<header><p class="over">Comparison</p><h1>{len(comparison.names)} runs</h1></header>',
        "<section><p>Losses in nats per token: the held-out loss of each domain where the runs validate, else the last "
        f"training loss. The domain with the largest difference comes first.</p>{origins}"
        f"{table_text(map(escape, comparison.headings), rows)}</section>",
    ]
    return page_text(f"Comparison of {len(comparison.names)} runs", body)


def _origin(run: RunFolder) -> str:
    """Return where a run was forked from; empty if it was not."""
    if not run.journal.is_file():
        return ""
    # The newest fork: a run may be forked from a forked one.
    lines = [line for line in run.journal.read_bytes().split(b"\n") if line.startswith(b'{"kind":"fork"')]
    if not lines:
        return ""
    fork = msgspec.json.decode(lines[-1])
    return f"forked from {fork['parent']} at step {fork['step']}"


def _loss_of(summary: RunSummary, name: str) -> float | None:
    domain = next((domain for domain in summary.domains if domain.name == name), None)
    if domain is None:
        return None
    return domain.loss_last if domain.held_out_loss is None else domain.held_out_loss


def _spread(summaries: Sequence[RunSummary], name: str) -> float:
    losses = [loss for summary in summaries if (loss := _loss_of(summary, name)) is not None]
    return float(np.ptp(losses)) if losses else 0.0


def _value(summary: RunSummary, name: str) -> str:
    return format_loss(_loss_of(summary, name), 3)


def _weight(summary: RunSummary, name: str) -> str:
    domain = next((domain for domain in summary.domains if domain.name == name), None)
    if domain is None:
        return MISSING
    return f"{format_share(domain.served_share)}, {format_share(domain.weight_last)}"
