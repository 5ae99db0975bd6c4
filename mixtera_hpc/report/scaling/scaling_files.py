"""The files of a comparison: `scaling.csv`, `limits.csv`, `scaling.png`, and `model.csv` with the model."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator, PercentFormatter, ScalarFormatter

from mixtera_hpc.report.plot_style import INK, MUTED, PALETTE, save_png, use_plot_style
from mixtera_hpc.report.scaling.scaling_model import ModelRow
from mixtera_hpc.report.scaling.scaling_table import ScalingRow
from mixtera_hpc.report.timing.stage_limits import StageLimit

__all__ = ["write_model", "write_scaling_files"]

WIDTH_IN = 9.4
HEIGHT_IN = 3.6


def write_scaling_files(rows: Sequence[ScalingRow], folder: Path) -> list[Path]:
    """Write the rows, their limits and a plot into `folder`, and return the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "scaling.csv"
    columns = [field.name for field in fields(ScalingRow) if field.name != "limits"]
    _write_csv(
        table, [*columns, "binding_stage"], [{**asdict(row), "binding_stage": row.binding_stage} for row in rows]
    )

    limits = folder / "limits.csv"
    columns = [field.name for field in fields(StageLimit)]
    lines = [{"run_id": row.run_id, "ranks": row.ranks, **asdict(limit)} for row in rows for limit in row.limits]
    _write_csv(limits, ["run_id", "ranks", *columns], lines)

    plot = folder / "scaling.png"
    with use_plot_style():
        save_png(_draw(rows), plot)
    return [table, limits, plot]


def write_model(rows: Sequence[ModelRow], folder: Path) -> Path:
    """Write the rows of the scaling model into `folder`, and return the path of the file."""
    path = folder / "model.csv"
    _write_csv(path, [field.name for field in fields(ModelRow)], [asdict(row) for row in rows])
    return path


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _draw(rows: Sequence[ScalingRow]) -> Figure:
    """Draw throughput and efficiency against the number of ranks, one line per group."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
    throughput, efficiency = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.15, wspace=0.2)
    groups = list(dict.fromkeys(row.group for row in rows))
    for number, group in enumerate(groups):
        members = [row for row in rows if row.group == group]
        color = PALETTE[number % len(PALETTE)]
        ranks = [row.ranks for row in members]
        throughput.plot(ranks, [row.tokens_per_s for row in members], "o-", color=color, label=group or "measured")
        efficiency.plot(ranks, [row.efficiency for row in members], "o-", color=color, label=group or "measured")
        _draw_ideal(throughput, members, is_labelled=number == 0)
    efficiency.axhline(1, color=MUTED, lw=0.9, ls="--")
    efficiency.set_ylim(0, max(1.1, *(1.08 * row.efficiency for row in rows)))
    efficiency.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    throughput.set_yscale("log", base=2)
    throughput.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    throughput.yaxis.set_major_formatter(EngFormatter(sep=""))
    throughput.yaxis.set_minor_locator(NullLocator())
    for axes, title in ((throughput, "throughput, tokens per second"), (efficiency, "efficiency")):
        _finish_axes(axes, title, rows)
    throughput.legend(frameon=False, loc="upper left", labelcolor=INK)
    return figure


def _draw_ideal(axes: Any, members: Sequence[ScalingRow], *, is_labelled: bool) -> None:
    """Draw the throughput of the reference run times the ratio of ranks."""
    first = members[0]
    ends = [first.ranks, members[-1].ranks]
    ideal = [first.tokens_per_s * ranks / first.ranks for ranks in ends]
    axes.plot(ends, ideal, color=MUTED, lw=0.9, ls="--", label="perfect scaling" if is_labelled else None)


def _finish_axes(axes: Any, title: str, rows: Sequence[ScalingRow]) -> None:
    axes.set_title(title, loc="left", color=MUTED, fontsize=8.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.ranks for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("ranks", loc="right", color=MUTED, fontsize=8)
