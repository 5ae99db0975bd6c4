"""The comparison of runs as text for a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixtera_hpc.report.number_format import format_count, format_duration, format_percent, format_seconds
from mixtera_hpc.report.scaling.scaling_model import ModelConstants, ModelRow, assumptions
from mixtera_hpc.report.scaling.scaling_table import ScalingRow
from mixtera_hpc.report.timing.stage_limits import LIMIT_COLUMNS, limit_cells

__all__ = ["limits_text", "model_text", "scaling_text"]

MODEL_COLUMNS = (
    *("nodes", "ranks", "plan", "broadcast", "losses", "reduction", "messages", "rank 0 CPU", "step longer by"),
    *("efficiency", "start", "imports"),
)

COLUMNS = ("run", "nodes", "ranks", "batch", "tokens/s", "per rank", "speed-up", "efficiency", "step", "data wait")


def scaling_text(rows: Sequence[ScalingRow]) -> RenderableType:
    """Return a table with one row per run; pairs of times are median / p95."""
    grouped = any(row.group for row in rows)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (*COLUMNS, "broadcast", "wait for reduction", *(("point",) if grouped else ())):
        table.add_column(column, justify="left" if column in ("run", "point") else "right", no_wrap=True)
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
            _time_pair(row.step_p50_s, row.step_p95_s),
            format_percent(row.data_wait_share),
            _time_pair(row.broadcast_p50_s, row.broadcast_p95_s),
            _time_pair(row.reduce_p50_s, row.reduce_p95_s),
            *((escape(row.group),) if grouped else ()),
        )
    return table


def limits_text(rows: Sequence[ScalingRow]) -> RenderableType:
    """Return a table of the stages of each run and their limits, the lowest limit first."""
    title = "Limits: the rate that each stage could sustain alone; the lowest one binds"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for column in ("ranks", *LIMIT_COLUMNS):
        table.add_column(column, justify="left" if column in ("stage", "") else "right", no_wrap=True)
    for row in rows:
        for number, limit in enumerate(row.limits):
            table.add_row(str(row.ranks) if number == 0 else "", *limit_cells(limit))
    return Group("", table)


def model_text(rows: Sequence[ModelRow], constants: ModelConstants) -> RenderableType:
    """Return the modelled costs of the data plane, and the assumptions of the model."""
    title = "Model of the data plane, with the same work per rank"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for column in MODEL_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            format_count(row.nodes),
            format_count(row.ranks),
            _format_bytes(row.broadcast_bytes),
            format_seconds(row.broadcast_s),
            _format_bytes(row.reduction_bytes),
            format_seconds(row.reduction_s),
            format_count(row.reduction_messages),
            format_seconds(row.root_cpu_s),
            format_seconds(row.exposed_s),
            format_percent(row.efficiency),
            format_duration(row.start_s),
            format_duration(row.import_s),
        )
    lines = [Text(f"  - {line}") for line in assumptions(constants)]
    return Group("", table, "", Text("Assumptions", style="bold"), *lines)


def _format_bytes(count: int) -> str:
    text = format_count(count)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def _time_pair(median: float | None, p95: float | None) -> str:
    return f"{format_seconds(median)} / {format_seconds(p95)}"
