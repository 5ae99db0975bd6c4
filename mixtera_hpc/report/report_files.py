"""Writes the report of a run: `report.html`, and every plot as a PNG file beside it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.html_page import RenderedPlot, render_page
from mixtera_hpc.report.plot_style import save_png, to_svg, use_plot_style
from mixtera_hpc.report.plots import PLOTS
from mixtera_hpc.report.projection import RunProjection, project_run
from mixtera_hpc.report.run_metrics import RunMetrics, load_run_metrics
from mixtera_hpc.report.summary import RunSummary, summarize_run

__all__ = ["WrittenReport", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """The content of a report and the files it was written to."""

    metrics: RunMetrics
    summary: RunSummary
    projection: RunProjection
    page: Path
    plots: tuple[Path, ...]
    """PNG files."""
    details: tuple[tuple[str, str], ...]
    """Label and text of what the caller adds."""


def write_report(
    run: RunFolder,
    folder: Path | None = None,
    describe: Callable[[RunMetrics], list[tuple[str, str]]] = lambda metrics: [],
) -> WrittenReport:
    """Write the report of `run` into `folder`, by default into `report/` of the run folder.

    Args:
        run: the run.
        folder: where the files go.
        describe: returns what else to say about the run, as label and text.

    Raises:
        LaunchError: `run` is not a run folder.
        DataError: no step was recorded yet, or the metrics are damaged.
    """
    metrics = load_run_metrics(run)
    summary = summarize_run(metrics)
    projection = project_run(metrics, summary)
    details = tuple(describe(metrics))

    target = folder or run.report
    target.mkdir(parents=True, exist_ok=True)
    rendered, png_files = _write_plots(metrics, target)
    page = target / "report.html"
    _replace_file(page, render_page(metrics, summary, projection, rendered, details))
    return WrittenReport(
        metrics=metrics,
        summary=summary,
        projection=projection,
        page=page,
        plots=tuple(png_files),
        details=details,
    )


def _write_plots(metrics: RunMetrics, folder: Path) -> tuple[dict[str, RenderedPlot], list[Path]]:
    """Draw every plot that has data; return them as SVG for the page, and the paths of the PNG files."""
    rendered = {}
    png_files = []
    with use_plot_style():
        for name, plot in PLOTS.items():
            wide = plot.draw(metrics, Canvas(wide=True))
            narrow = plot.draw(metrics, Canvas(wide=False))
            if wide is None or narrow is None:
                continue
            png_file = folder / f"{name}.png"
            save_png(wide, png_file)
            png_files.append(png_file)
            rendered[name] = RenderedPlot(
                title=plot.title,
                caption=plot.caption,
                wide_svg=to_svg(wide, plot.title),
                narrow_svg=to_svg(narrow, plot.title),
                legend=_legend(narrow),
            )
    return rendered, png_files


def _legend(figure: Figure) -> tuple[tuple[str, str], ...]:
    """Return name and color of every labelled curve."""
    lines, names = figure.axes[0].get_legend_handles_labels()
    return tuple((str(name), str(cast(Line2D, line).get_color())) for line, name in zip(lines, names, strict=True))


def _replace_file(path: Path, text: str) -> None:
    """Write a file atomically, so that a browser that reloads the page never reads an incomplete one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
