"""A run's report on disk: `report.html`, and every plot as PNG beside it."""

import os
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.config.runfolder import RunFolder
from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.forecast import Forecast, forecast
from mixtera_hpc.report.load import Record, load_record
from mixtera_hpc.report.look import save_png, styled, to_svg
from mixtera_hpc.report.page import render_page
from mixtera_hpc.report.plots import PLOTS
from mixtera_hpc.report.summary import Summary, summarise

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found and where it was written."""

    record: Record
    summary: Summary
    projection: Forecast
    page: Path
    plots: tuple[Path, ...]


def write_report(run: RunFolder, folder: Path | None = None) -> Report:
    """Write the report of `run` into `folder`, by default the run's own `report/`.

    Raises:
        LaunchError: `run` is no run.
        DataError: it has recorded no step, or its metrics are damaged.
    """
    record = load_record(run)
    summary = summarise(record)
    ahead = forecast(record, summary)
    target = folder or run.report
    target.mkdir(parents=True, exist_ok=True)
    figures, plots = {}, []
    with styled():
        for name, (draw, title, caption) in PLOTS.items():
            wide, narrow = (draw(record, Canvas(wide=wide)) for wide in (True, False))
            if wide is None or narrow is None:
                continue
            plots.append(target / f"{name}.png")
            save_png(wide, plots[-1])
            figures[name] = (title, caption, to_svg(wide, title), to_svg(narrow, title))
    page = target / "report.html"
    _replace(page, render_page(record, summary, ahead, figures))
    return Report(record=record, summary=summary, projection=ahead, page=page, plots=tuple(plots))


def _replace(path: Path, text: str) -> None:
    """Whoever has the page open, or reloads it, never sees half of one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
