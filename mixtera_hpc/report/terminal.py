"""The report in a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixtera_hpc.report.commands import next_commands
from mixtera_hpc.report.domain_groups import common_key, short_names
from mixtera_hpc.report.number_format import format_count, format_duration, format_percent, format_seconds
from mixtera_hpc.report.report_files import WrittenReport
from mixtera_hpc.report.scaling import ScalingRow
from mixtera_hpc.report.summary import DomainSummary, RunSummary

__all__ = ["report_text", "scaling_text"]

MAX_ROWS = 20


def report_text(report: WrittenReport) -> RenderableType:
    """The numbers, the domains, the forecast, and what to type next."""
    summary, run = report.summary, report.record.run
    lines: list[RenderableType] = ["", _headline(summary), "", _numbers(summary), "", _domains(summary)]
    if report.projection.steps_left:
        left = f"{format_count(report.projection.steps_left, 4)} steps left, about {format_duration(report.projection.seconds_left)}"
        lines += ["", Text(f"{left}; {format_count(report.projection.tokens)} tokens in the end.")]
    commands = Table.grid(padding=(0, 3))
    for command, why in next_commands(run, summary):
        commands.add_row(Text(f"  {command}", no_wrap=True, overflow="ignore"), Text(why, style="dim"))
    page = Text.assemble(("Report  ", "bold"), str(report.page), no_wrap=True, overflow="ignore")
    lines += ["", page, "", Text("Next", style="bold"), commands, ""]
    return Group(*lines)


def scaling_text(rows: Sequence[ScalingRow]) -> RenderableType:
    """One line per run; times are p50 / p95."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ("run", "nodes", "ranks", "batch", "tokens/s", "per rank", "speed-up", "efficiency")
    for heading in (*headings, "step", "data wait", "broadcast", "wait for reduction"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(f"{row.name}/{row.run_id}"),
            format_count(row.nodes),
            str(row.ranks),
            format_count(row.global_batch_size, 4),
            format_count(row.tokens_per_s),
            format_count(row.tokens_per_s_per_rank),
            f"{row.speedup:.2f} ×",
            format_percent(row.efficiency),
            _pair(row.step_p50_s, row.step_p95_s),
            format_percent(row.data_wait_share),
            _pair(row.broadcast_p50_s, row.broadcast_p95_s),
            _pair(row.reduce_p50_s, row.reduce_p95_s),
        )
    return table


def _headline(summary: RunSummary) -> Text:
    speed = summary.speed
    nodes = f" on {speed.num_nodes} node{'s' if speed.num_nodes != 1 else ''}" if speed.num_nodes else ""
    ranks = f"{speed.num_ranks} rank{'s' if speed.num_ranks != 1 else ''}{nodes}"
    attempts = f"{summary.num_attempts} attempt{'s' if summary.num_attempts != 1 else ''}"
    steps = f"{format_count(summary.steps, 4)} of {format_count(summary.num_steps, 4)} steps"
    return Text.assemble((summary.name, "bold"), (f"  {summary.run_id} · {steps} · {attempts} · {ranks}", "dim"))


def _numbers(summary: RunSummary) -> Table:
    speed = summary.speed
    first, last = summary.loss_first, summary.loss_last
    grid = Table.grid(padding=(0, 3))
    rows = [
        ("loss", "–" if last is None or first is None else f"{first:.3f} → {last:.3f} nats per token"),
        *([("held-out loss", f"{summary.held_out:.3f}")] if summary.held_out is not None else []),
        ("tokens", f"{format_count(summary.tokens)} in {format_duration(summary.train_s)} of steps"),
        (
            "throughput",
            f"{format_count(speed.tokens_per_s)} tokens/s, {format_count(speed.tokens_per_s / speed.num_ranks)} per rank",
        ),
        ("step", f"{format_seconds(speed.step_p50_s)}, p95 {format_seconds(speed.step_p95_s)}"),
        (
            "data wait",
            f"{format_percent(speed.data_wait_share)} of step time, p99 {format_percent(speed.data_wait_p99_share)}",
        ),
        ("broadcast", f"{format_seconds(speed.broadcast_p50_s)}, p95 {format_seconds(speed.broadcast_p95_s)}"),
        ("waiting for reductions", f"{format_seconds(speed.reduce_p50_s)}, p95 {format_seconds(speed.reduce_p95_s)}"),
    ]
    if summary.num_nonfinite:
        rows.append(("not finite", f"the loss of {format_count(summary.num_nonfinite)} sequences; they are left out"))
    for name, value in rows:
        grid.add_row(Text(f"  {name}", style="dim"), value)
    return grid


def _domains(summary: RunSummary) -> Table:
    names = [d.name for d in summary.domains]
    short = short_names(names)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="dim")
    validated = ["held out"] if summary.held_out is not None else []
    for heading in (common_key(names) or "domain", "weight", "served", "tokens", "epochs", "loss", *validated):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=bool(table.columns))
    ordered = sorted(summary.domains, key=lambda d: -d.served)
    for domain in ordered[:MAX_ROWS]:
        held_out = [_loss(domain.held_out)] if validated else []
        table.add_row(escape(short[domain.domain_id]), *_row(domain), *held_out)
    if ordered[MAX_ROWS:]:
        rest = ordered[MAX_ROWS:]
        served, tokens = sum(d.served for d in rest), sum(d.tokens for d in rest)
        table.add_row(f"{len(rest)} others", "", _share(served), format_count(tokens), "", "")
    return table


def _row(domain: DomainSummary) -> tuple[str, ...]:
    return (
        _change(_share(domain.weight_first), _share(domain.weight_last)),
        _share(domain.served),
        format_count(domain.tokens),
        "–" if domain.epochs is None else f"{domain.epochs:.2f}",
        _change(_loss(domain.loss_first), _loss(domain.loss_last)),
    )


def _pair(first: float | None, second: float | None) -> str:
    return f"{format_seconds(first)} / {format_seconds(second)}"


def _change(first: str, last: str) -> str:
    return last if first == last else f"{first} → {last}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.2f}"
