"""A run's report on disk: `report.html`, and every plot as PNG beside it."""

import os
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.html_page import render_page
from mixtera_hpc.report.plot_style import save_png, to_svg, use_plot_style
from mixtera_hpc.report.plots import PLOTS
from mixtera_hpc.report.projection import RunProjection, project_run
from mixtera_hpc.report.run_metrics import RunMetrics, load_run_metrics
from mixtera_hpc.report.summary import RunSummary, summarize_run

__all__ = ["WrittenReport", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """What was found and where it was written."""

    record: RunMetrics
    summary: RunSummary
    projection: RunProjection
    page: Path
    plots: tuple[Path, ...]


def write_report(run: RunFolder, folder: Path | None = None) -> WrittenReport:
    """Write the report of `run` into `folder`, by default the run's own `report/`.

    Raises:
        LaunchError: `run` is no run.
        DataError: it has recorded no step, or its metrics are damaged.
    """
    record = load_run_metrics(run)
    summary = summarize_run(record)
    ahead = project_run(record, summary)
    target = folder or run.report
    target.mkdir(parents=True, exist_ok=True)
    figures, plots = {}, []
    with use_plot_style():
        for name, (draw, title, caption) in PLOTS.items():
            wide, narrow = (draw(record, Canvas(wide=wide)) for wide in (True, False))
            if wide is None or narrow is None:
                continue
            plots.append(target / f"{name}.png")
            save_png(wide, plots[-1])
            figures[name] = (title, caption, to_svg(wide, title), to_svg(narrow, title))
    page = target / "report.html"
    _replace(page, render_page(record, summary, ahead, figures))
    return WrittenReport(record=record, summary=summary, projection=ahead, page=page, plots=tuple(plots))


def _replace(path: Path, text: str) -> None:
    """Whoever has the page open, or reloads it, never sees half of one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
