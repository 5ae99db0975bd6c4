"""The plots of a swarm's page: predicted against measured, shares, and how the loss depends on each domain."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mixtera_hpc.report.canvas import spread_labels
from mixtera_hpc.report.mixing.domain_names import shorten_names
from mixtera_hpc.report.plot_style import INK, LINE, MUTED, PALETTE, SURFACE
from mixtera_hpc.swarm.cross_validation import mean_loss
from mixtera_hpc.swarm.swarm_fit import SwarmFit, range_curves
from mixtera_hpc.swarm.training_phases import share_names

__all__ = ["CHECK_COLORS", "CHECK_NAMES", "SWARM_PLOTS", "SwarmPlot", "legend_of", "short_names"]

MAX_CURVES = 9
"""Domains with a curve: those on which the loss depends most."""
MAX_BARS = 30
"""Domains with a row in the plot of shares: those with the largest proposed or natural share."""
NUM_POINTS = 41
CHECK_COLORS = (PALETTE[9], PALETTE[1], PALETTE[2])
"""Natural, uniform, proposal."""
CHECK_NAMES = ("natural", "uniform", "proposal")
LABEL_GAP = 0.075


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmPlot:
    """One plot of the page."""

    title: str
    caption: str
    draw: Callable[[SwarmFit, bool], Figure]
    """A function that draws the plot: wide (True), or narrow for a phone (False)."""
    has_legend: bool = False
    """True if the wide plot needs a legend too."""


def _axes(
    wide: bool, height: float, *, top: float = 0.36, left: float = 0.62, right: float = 0.2
) -> tuple[Figure, Any]:
    """Create a figure with empty axes; height and margins are in inches."""
    width = 9.4 if wide else 3.9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 0.42 / height, 1 - (left + right) / width, 1 - (0.42 + top) / height))
    return figure, axes


def _label(figure: Figure, axes: Any, x: str, y: str) -> None:
    width, height = figure.get_size_inches()
    axes.set_xlabel(x, loc="right", color=MUTED, labelpad=2, fontsize=8)
    figure.text(0.03 / width, 1 - 0.17 / height, y, color=MUTED, fontsize=8)


def predicted_plot(fit: SwarmFit, wide: bool) -> Figure:
    """Draw the mean loss of every run as measured, over what a fit without it predicts."""
    measured = mean_loss(fit.measured.losses, fit.measured.objective)
    predicted = mean_loss(fit.chosen.predictions, fit.measured.objective)
    known = np.isfinite(measured)
    checks = [(place, value) for place in range(3) if (value := fit.measured_check(place)) is not None]
    everything = np.concatenate([measured[known], predicted[known], *[[fit.predicted[p], v] for p, v in checks]])

    figure, axes = _axes(wide, 4.0 if wide else 3.2)
    margin = 0.05 * max(float(np.ptp(everything)), 1e-6) if len(everything) else 1.0
    ends = (everything.min() - margin, everything.max() + margin) if len(everything) else (0.0, 1.0)
    axes.plot(ends, ends, color=LINE, lw=1.2, zorder=1)
    axes.scatter(predicted[known], measured[known], s=26, color=PALETTE[0], edgecolor=SURFACE, linewidth=0.6, zorder=3)
    for place, value in checks:
        color = CHECK_COLORS[place]
        axes.scatter(
            [fit.predicted[place]], [value], s=64, marker="D", color=color, edgecolor=INK, linewidth=0.6, zorder=4
        )
        axes.annotate(
            CHECK_NAMES[place],
            (fit.predicted[place], value),
            xytext=(8, -3),
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
    _label(figure, axes, "predicted loss", "measured loss")
    return figure


def shares_plot(fit: SwarmFit, wide: bool) -> Figure:
    """Draw natural and proposed share of every domain, over the range that the runs measured."""
    natural = fit.checks.mixtures[0]
    shown = np.argsort(-np.maximum(natural, fit.proposal), kind="stable")[:MAX_BARS]
    names = [_short(name, 24 if wide else 14) for name in np.array(short_names(fit))[shown]]
    figure, axes = _axes(wide, 0.62 + 0.27 * len(shown), top=0.08, left=1.75 if wide else 1.1)
    rows = np.arange(len(shown))
    axes.hlines(
        rows,
        fit.measured.mixtures.min(axis=0)[shown],
        fit.measured.mixtures.max(axis=0)[shown],
        color=LINE,
        lw=7,
        zorder=1,
    )
    axes.scatter(natural[shown], rows, s=40, color=CHECK_COLORS[0], zorder=3, label="natural")
    axes.scatter(fit.proposal[shown], rows, s=46, marker="D", color=CHECK_COLORS[2], zorder=4, label="proposal")
    axes.set_yticks(rows, names, color=INK)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
    _label(figure, axes, "share", "")
    return figure


def sensitivity_plot(fit: SwarmFit, wide: bool) -> Figure:
    """Draw the predicted mean loss over the share of each domain, the others in the ratios of the proposal."""
    shares, values = range_curves(fit, NUM_POINTS)
    shown = np.argsort(-np.ptp(values, axis=1), kind="stable")[:MAX_CURVES]
    names = short_names(fit)
    if wide:
        figure, axes = _axes(wide, 3.8, right=2.0)
    else:
        figure, axes = _axes(wide, 3.0)
    for place, domain in enumerate(shown.tolist()):
        color = PALETTE[place]
        axes.plot(shares[domain], values[domain], color=color, label=names[domain])
        axes.scatter([fit.proposal[domain]], [fit.predicted[2]], s=22, color=color, zorder=4)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
    if wide:
        _label_ends(axes, [(names[d], float(values[d, -1]), PALETTE[i]) for i, d in enumerate(shown.tolist())])
    _label(figure, axes, "share of the domain", "predicted loss")
    return figure


def short_names(fit: SwarmFit) -> list[str]:
    """Return the names of all shares, without the properties that all domains share."""
    return share_names(shorten_names(fit.record.names), fit.record.num_phases)


def legend_of(figure: Figure) -> list[tuple[str, str]]:
    """Return name and color of every labelled line, and of the labelled dots of scatter plots."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    colors = [h.get_facecolor()[0] if hasattr(h, "get_facecolor") else h.get_color() for h in handles]  # type: ignore[attr-defined]
    return [(str(name), to_hex(color)) for name, color in zip(names, colors, strict=True)]


def _label_ends(axes: Any, curves: Sequence[tuple[str, float, str]]) -> None:
    """Write the name of every curve at the right edge, at the height of its end where there is room."""
    low, high = axes.get_ylim()
    preferred = np.array([np.clip((end - low) / (high - low), 0, 1) for _, end, _ in curves])
    for (name, _, color), height in zip(curves, spread_labels(preferred, LABEL_GAP), strict=True):
        axes.plot([1.012, 1.03], [height, height], transform=axes.transAxes, color=color, lw=2.2, clip_on=False)
        axes.text(1.038, height, _short(name, 26), transform=axes.transAxes, va="center", color=INK)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


SWARM_PLOTS: Mapping[str, SwarmPlot] = {
    "predicted": SwarmPlot(
        title="Predicted and measured",
        caption="Every dot is a proxy run: its measured mean loss, over the prediction of a regression that was fitted "
        "without it. Diamonds are runs that no regression has seen. On the line, prediction and measurement agree.",
        draw=predicted_plot,
    ),
    "shares": SwarmPlot(
        title="Proposed mixture",
        caption="Diamonds are the proposed shares, circles the natural ones. Bars cover the shares that the proxies "
        "measured; the proposal stays inside them.",
        draw=shares_plot,
        has_legend=True,
    ),
    "sensitivity": SwarmPlot(
        title="Sensitivity per domain",
        caption="The predicted mean loss if the share of one domain changes and the others keep their ratios in the "
        "proposal. Dots mark the proposal. A flat curve means that the share of this domain hardly matters.",
        draw=sensitivity_plot,
    ),
}
