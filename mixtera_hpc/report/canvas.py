"""Axes for the plots of a report: steps or tokens on the x axis, marks where attempts began, labels at line ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mixtera_hpc.report.plot_style import INK, MUTED
from mixtera_hpc.report.run_metrics import Floats, RunMetrics

__all__ = ["Canvas", "spread_labels"]

MAX_LABEL_LENGTH = 27
LABEL_END_LENGTH = 10
"""Characters at the end of a long name that its label keeps."""
MAX_MARKED_ATTEMPTS = 8
"""With more attempts, the marks have no text."""
LABEL_GAP = 0.07
"""Vertical distance of labels, as a fraction of the height of the axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """The size of a plot: wide with labels at the right, or narrow, for a phone, without."""

    wide: bool

    def axes(self, metrics: RunMetrics, y_label: str, *, tall: bool = True) -> tuple[Figure, Any]:
        """Create a figure with empty axes. All wide figures leave the same room for labels, so that steps line up."""
        # All sizes are in inches; axes positions are fractions of the figure.
        if self.wide:
            width = 9.4
            height = 3.3 if tall else 2.4
        else:
            width = 3.9
            height = 2.9 if tall else 2.3
        figure = Figure(figsize=(width, height))
        x_min = 0.55 / width
        x_max = 0.79 if self.wide else 1 - 0.14 / width
        axes = figure.add_axes((x_min, 0.36 / height, x_max - x_min, 1 - 0.74 / height))

        axes.set_xlim(0, max(int(metrics.progress_before(metrics.steps.step[-1:] + 1)[0]), 1))
        axes.xaxis.set_major_locator(MaxNLocator(7 if self.wide else 4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(
            "tokens" if metrics.is_counted_in_tokens else "step", loc="right", color=MUTED, labelpad=1, fontsize=8
        )
        figure.text(0.03 / width, 1 - 0.17 / height, y_label, color=MUTED, fontsize=8)
        self._mark_attempts(axes, metrics)
        return figure, axes

    def label(self, axes: Any, names: Sequence[str], heights: Sequence[float], colors: Sequence[str]) -> None:
        """Write each name at the right edge at its height in data units; move labels apart that would overlap.

        A narrow plot only carries its names and colors; the page shows them as a legend above it.
        """
        if not self.wide:
            for name, color in zip(names, colors, strict=True):
                axes.plot([], [], color=color, label=name)
            return

        axes.get_ylim()  # Forces matplotlib to compute the limits; the transform below needs them.
        to_fraction = axes.transData + axes.transAxes.inverted()
        preferred = np.clip([to_fraction.transform((1, height))[1] for height in heights], 0, 1)
        placed = spread_labels(preferred, LABEL_GAP)
        for name, line_end, label_y, color in zip(names, preferred, placed, colors, strict=True):
            axes.plot([1, 1.012], [line_end, label_y], transform=axes.transAxes, color=color, lw=1.2, clip_on=False)
            axes.text(1.018, label_y, _shorten(name), transform=axes.transAxes, va="center", color=INK)

    def _mark_attempts(self, axes: Any, metrics: RunMetrics) -> None:
        """Draw a vertical line where each resumed attempt began."""
        resumed = metrics.resumed_attempts
        for attempt, step in resumed:
            x = int(metrics.progress_before(np.array([step]))[0])
            axes.axvline(x, color=MUTED, lw=0.7, zorder=3)
            if self.wide and len(resumed) <= MAX_MARKED_ATTEMPTS:
                position = {"xy": (x, 1.02), "xycoords": ("data", "axes fraction"), "ha": "center"}
                axes.annotate(f"attempt {attempt}", **position, color=MUTED, fontsize=7.5)


def spread_labels(preferred: Floats, gap: float) -> Floats:
    """Return positions in [0, 1] that are at least `gap` apart and close to the preferred ones.

    The order is kept. If the labels do not fit, the gap is reduced until they do.
    """
    count = len(preferred)
    # No domain has a loss if the trainer records none.
    if count == 0:
        return preferred
    gap = min(gap, 1 / max(count - 1, 1))
    order = np.argsort(preferred, kind="stable")

    # Subtracting rank × gap turns "at least gap apart" into "not decreasing". Pool adjacent violators: labels that
    # would overlap form a block, and a block lies at the mean of its preferred positions. Entries are [sum, size].
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([preferred[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + size]

    shifted = np.concatenate([np.full(int(size), total / size) for total, size in blocks])
    shifted = np.clip(shifted, 0, 1 - (count - 1) * gap)
    placed = np.empty(count)
    placed[order] = shifted + np.arange(count) * gap
    return placed


def _shorten(name: str) -> str:
    """Return a long name with its middle left out; names of one project often begin alike."""
    if len(name) <= MAX_LABEL_LENGTH:
        return name
    end = name[-LABEL_END_LENGTH:]
    return f"{name[: MAX_LABEL_LENGTH - 1 - len(end)]}…{end}"
