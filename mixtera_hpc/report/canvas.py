"""Where a plot is drawn: axes over the steps of a run, attempts marked, names at the lines' ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from mixtera_hpc.report.plot_style import INK, MUTED
from mixtera_hpc.report.run_metrics import Floats, RunMetrics

__all__ = ["MAX_IN_LEGEND", "Canvas", "spread"]

MAX_NAME = 27
MAX_IN_LEGEND = 3
"""Names above a narrow plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A size to draw at: wide with names beside the plot, or narrow, for a phone, without."""

    wide: bool

    def axes(self, record: RunMetrics, y_label: str, *, labels: bool = True) -> tuple[Figure, Any]:
        """An empty figure; taller, and with room at the right, when `labels` are to come."""
        width, height = (9.4, 3.3 if labels else 2.4) if self.wide else (3.9, 2.9 if labels else 2.3)
        figure = Figure(figsize=(width, height))
        left, right = 0.55 / width, 0.79 if self.wide and labels else 1 - 0.14 / width
        axes = figure.add_axes((left, 0.36 / height, right - left, 1 - 0.74 / height))
        axes.set_xlim(0, max(int(record.steps.step[-1]) + 1, 1))
        axes.xaxis.set_major_locator(MaxNLocator(7 if self.wide else 4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step", loc="right", color=MUTED, labelpad=1, fontsize=8)
        figure.text(0.03 / width, 1 - 0.17 / height, y_label, color=MUTED, fontsize=8)
        self._mark_attempts(axes, record)
        return figure, axes

    def label(self, axes: Any, names: Sequence[str], heights: Sequence[float], colors: Sequence[str]) -> None:
        """Write each name at the right edge, at its height in data units, moved apart where they would touch.

        A narrow plot has room for a few names above it; more are the page's to explain.
        """
        if not self.wide:
            self._legend(axes, names, colors)
            return
        axes.get_ylim()  # Settles the limits, which the transform does not do.
        to_fraction = axes.transData + axes.transAxes.inverted()
        wanted = np.clip([to_fraction.transform((1, height))[1] for height in heights], 0, 1)
        for name, at, placed, color in zip(names, wanted, spread(wanted, 0.07), colors, strict=True):
            axes.plot([1, 1.012], [at, placed], transform=axes.transAxes, color=color, lw=1.2, clip_on=False)
            text = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
            axes.text(1.018, placed, text, transform=axes.transAxes, va="center", color=INK)

    def _legend(self, axes: Any, names: Sequence[str], colors: Sequence[str]) -> None:
        if len(names) <= MAX_IN_LEGEND:
            lines = [Line2D([], [], color=color) for color in colors]
            place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "ncols": len(names), "frameon": False}
            axes.legend(lines, names, **place, fontsize=7, handlelength=1, columnspacing=1, borderpad=0.2)

    def _mark_attempts(self, axes: Any, record: RunMetrics) -> None:
        resumed = record.resumed_at
        for attempt, step in resumed:
            axes.axvline(step, color=MUTED, lw=0.7, zorder=3)
            if self.wide and len(resumed) <= 8:
                place = {"xy": (step, 1.02), "xycoords": ("data", "axes fraction"), "ha": "center"}
                axes.annotate(f"attempt {attempt}", **place, color=MUTED, fontsize=7.5)


def spread(wanted: Floats, gap: float) -> Floats:
    """Positions as near to `wanted` as keeps neighbours `gap` apart; they squeeze together when there is no room."""
    count = len(wanted)
    gap = min(gap, 1 / max(count - 1, 1))
    order = np.argsort(wanted, kind="stable")
    groups: list[list[float]] = []  # [sum of shifted positions, members]; pools that collide become one.
    for rank, index in enumerate(order):
        groups.append([wanted[index] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    shifted = np.concatenate([np.full(int(n), total / n) for total, n in groups])
    shifted = np.clip(shifted, 0, 1 - (count - 1) * gap)
    placed = np.empty(count)
    placed[order] = shifted + np.arange(count) * gap
    return placed
