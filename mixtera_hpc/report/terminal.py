"""The report as text for a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixtera_hpc.errors import pluralize
from mixtera_hpc.report.mixing.domain_names import common_property, shorten_names
from mixtera_hpc.report.mixing.learned_mixture import learned_rows
from mixtera_hpc.report.number_format import (
    MISSING,
    format_count,
    format_duration,
    format_loss,
    format_percent,
    format_share,
)
from mixtera_hpc.report.phrases import (
    MAX_STALLS,
    SILENT_MIXTURE,
    describe_data_end,
    describe_progress,
    describe_remaining,
    median_and_p95,
    next_commands,
    stall_cells,
)
from mixtera_hpc.report.report_files import WrittenReport
from mixtera_hpc.report.summary import DomainSummary, RunSummary
from mixtera_hpc.report.timing.stage_limits import LIMIT_COLUMNS, limit_cells
from mixtera_hpc.report.timing.stalls import STALL_COLUMNS

__all__ = ["report_text"]

MAX_DOMAINS = 20
"""Number of domains in the table; the smaller ones share a row."""


def report_text(report: WrittenReport) -> RenderableType:
    """Return the numbers of a report, its domains and projection, and the commands to run next."""
    summary = report.summary
    title = Text.assemble((summary.name, "bold"), (f"  {summary.run_id} · {describe_progress(summary)}", "dim"))
    lines: list[RenderableType] = ["", title, "", _numbers(summary, report.details), "", _domain_table(summary)]
    lines += ["", _limit_table(summary)]
    if summary.stalls:
        lines += ["", _stall_table(summary)]
    learned = _learned_table(report)
    if learned is not None:
        lines += ["", learned]
    if report.projection.remaining_steps:
        lines += ["", describe_remaining(report.projection)]

    page = Text.assemble(("Report  ", "bold"), str(report.page), no_wrap=True, overflow="ignore")
    commands = Table.grid(padding=(0, 3))
    for command, purpose in next_commands(report.metrics.run, summary):
        commands.add_row(Text(f"  {command}", no_wrap=True, overflow="ignore"), Text(purpose, style="dim"))
    lines += ["", page, "", Text("Next commands", style="bold"), commands, ""]
    return Group(*lines)


def _numbers(summary: RunSummary, details: Sequence[tuple[str, str]]) -> Table:
    performance = summary.performance
    rows = [("loss", _describe_loss(summary))]
    if summary.held_out_loss is not None:
        rows.append(("held-out loss", f"{summary.held_out_loss:.3f}"))
    rows += [
        ("tokens", f"{format_count(summary.tokens)} in {format_duration(summary.train_s)} of training"),
        (
            "throughput",
            f"{format_count(performance.tokens_per_s)} tokens/s, "
            f"{format_count(performance.tokens_per_s_per_rank)} per rank",
        ),
        ("step time", median_and_p95(performance.step_p50_s, performance.step_p95_s)),
        (
            "data wait",
            f"{format_percent(performance.data_wait_share)} of step time, "
            f"p99 {format_percent(performance.data_wait_p99_share)}",
        ),
        ("broadcast of a plan", median_and_p95(performance.broadcast_p50_s, performance.broadcast_p95_s)),
        ("wait for reduction", median_and_p95(performance.reduce_p50_s, performance.reduce_p95_s)),
    ]
    if summary.num_nonfinite:
        excluded = f"{pluralize(summary.num_nonfinite, 'sequence')}, excluded from all losses"
        rows.append(("non-finite loss", excluded))

    rows += [("note", warning) for warning in summary.warnings]
    if summary.hears_losses is False:
        rows.append(("mixture", SILENT_MIXTURE))
    if summary.data_end is not None:
        rows.append(("left over at the end", describe_data_end(summary.data_end)))
    rows += [(label.lower(), text) for label, text in details]

    grid = Table.grid(padding=(0, 3))
    for label, value in rows:
        grid.add_row(Text(f"  {label}", style="dim"), value)
    return grid


def _describe_loss(summary: RunSummary) -> str:
    if summary.loss_first is None or summary.loss_last is None:
        return MISSING
    return f"{summary.loss_first:.3f} → {summary.loss_last:.3f} nats per token"


def _domain_table(summary: RunSummary) -> Table:
    names = [domain.name for domain in summary.domains]
    short_names = shorten_names(names)
    with_held_out = summary.held_out_loss is not None

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="dim")
    table.add_column(common_property(names) or "domain", justify="left")
    columns = ["weight", "served", "tokens", "epochs", "loss"]
    if with_held_out:
        columns.append("held-out loss")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    by_size = sorted(summary.domains, key=lambda domain: -domain.served_share)
    for domain in by_size[:MAX_DOMAINS]:
        cells = [escape(short_names[domain.domain_id]), *_domain_cells(domain)]
        if with_held_out:
            cells.append(format_loss(domain.held_out_loss))
        table.add_row(*cells)

    others = by_size[MAX_DOMAINS:]
    if others:
        served_share = sum(domain.served_share for domain in others)
        tokens = sum(domain.tokens for domain in others)
        table.add_row(f"{len(others)} others", "", format_share(served_share), format_count(tokens), "", "")
    return table


def _limit_table(summary: RunSummary) -> Table:
    """Return the throughput that each stage could sustain alone."""
    title = "Limits: throughput that each stage could sustain alone"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="dim", title=title, title_justify="left")
    for number, column in enumerate(LIMIT_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for limit in summary.limits:
        table.add_row(*map(escape, limit_cells(limit)))
    return table


def _stall_table(summary: RunSummary) -> Table:
    """Return the ranks that kept the others waiting."""
    title = "Stalls: ranks that kept the others waiting"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="dim", title=title, title_justify="left")
    for column in STALL_COLUMNS:
        table.add_column(column, justify="left" if column in ("node", "stage") else "right", no_wrap=True)
    for stall in summary.stalls[:MAX_STALLS]:
        table.add_row(*map(escape, stall_cells(stall)))
    return table


def _learned_table(report: WrittenReport) -> Table | None:
    """Return what the mixing algorithm has learned about the largest domains; None if it has recorded nothing."""
    headings, rows = learned_rows(report.metrics.learned)
    if not rows:
        return None
    table = Table(title="learned", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 or heading == "law" else "right")
    by_size = sorted(report.summary.domains, key=lambda domain: -domain.served_share)
    for domain in by_size[:MAX_DOMAINS]:
        table.add_row(*map(escape, rows[domain.domain_id]))
    return table


def _domain_cells(domain: DomainSummary) -> list[str]:
    return [
        _change(format_share(domain.weight_first), format_share(domain.weight_last)),
        format_share(domain.served_share),
        format_count(domain.tokens),
        MISSING if domain.epochs is None else f"{domain.epochs:.2f}",
        _change(format_loss(domain.loss_first), format_loss(domain.loss_last)),
    ]


def _change(first: str, last: str) -> str:
    return last if first == last else f"{first} → {last}"
