"""The plots of a report. Each function draws one figure from the metrics of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.domain_groups import DomainGroup, group_domains, group_loss, sum_by_group
from mixtera_hpc.report.downsample import even_indices, percentile_ranges, weighted_means
from mixtera_hpc.report.number_format import format_count, format_percent, format_seconds, format_share
from mixtera_hpc.report.plot_style import INK, MUTED, PALETTE, SURFACE, group_color
from mixtera_hpc.report.run_metrics import Floats, Ints, RunMetrics, StepHistory, ValidationHistory

__all__ = [
    "PLOTS",
    "Plot",
    "communication_plot",
    "data_wait_plot",
    "loss_plot",
    "mixture_plot",
    "throughput_plot",
    "validation_plot",
]

DASHED = (0, (4, 2))
DATA_WAIT_GOAL = 1e-3
"""Share of step time that a run should not wait for data; drawn as a dashed line."""
MIN_SHARE = 1e-5
"""Lower end of the logarithmic axis of shares."""


def mixture_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw the requested weights of every chunk, stacked; None if there are none or only one domain."""
    if not len(metrics.mixture.step) or len(metrics.domains) == 1:
        return None
    groups = group_domains(metrics)
    weights = sum_by_group(groups, metrics.mixture.weights)

    # Repeat the last weights at the end of the run, so that the last chunk has a width.
    indices = even_indices(len(weights))
    x = metrics.progress_before(np.append(metrics.mixture.step[indices], metrics.steps.step[-1] + 1))
    weights = np.vstack([weights[indices], weights[-1:]])

    figure, axes = canvas.axes(metrics, "weight")
    colors = [group_color(group.color) for group in groups]
    axes.stackplot(x, weights.T, colors=colors, edgecolor=SURFACE, linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.grid(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))

    final = weights[-1]
    centers = np.cumsum(final) - final / 2
    names = [f"{format_share(weight)}  {group.name}" for group, weight in zip(groups, final, strict=True)]
    canvas.label(axes, names, centers.tolist(), colors)
    return figure


def loss_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw the mean loss per token of every domain group and of all tokens."""
    return _draw_losses(metrics, canvas, metrics.steps)


def validation_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw the same for held-out samples; None if there was no validation."""
    if not len(metrics.validation.step):
        return None
    return _draw_losses(metrics, canvas, metrics.validation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    name: str
    color: str
    x: Floats
    loss: Floats
    dashed: bool = False


def _draw_losses(metrics: RunMetrics, canvas: Canvas, history: StepHistory | ValidationHistory) -> Figure:
    figure, axes = canvas.axes(metrics, "loss, nats per token")
    curves = _loss_curves(metrics, history)
    for curve in curves:
        style = DASHED if curve.dashed else "-"
        axes.plot(curve.x, curve.loss, color=curve.color, ls=style, **_marker(curve.x))
    if curves:
        _hide_initial_fall(axes, [curve.loss for curve in curves])
    canvas.label(
        axes,
        [f"{curve.loss[-1]:.2f}  {curve.name}" for curve in curves],
        [float(curve.loss[-1]) for curve in curves],
        [curve.color for curve in curves],
    )
    return figure


def _loss_curves(metrics: RunMetrics, history: StepHistory | ValidationHistory) -> list[_Curve]:
    curves = []
    steps = metrics.progress_before(history.step)
    for group in group_domains(metrics):
        x, loss = _mean_group_loss(history, group, steps)
        curves.append(_Curve(name=group.name, color=group_color(group.color), x=x, loss=loss))
    if len(metrics.domains) > 1:
        tokens = history.domain_tokens.sum(axis=1).astype(np.float64)
        x, loss = weighted_means(steps, history.loss, tokens)
        curves.append(_Curve(name="all", color=INK, x=x, loss=loss, dashed=True))
    return [curve for curve in curves if len(curve.x)]


def _mean_group_loss(history: StepHistory | ValidationHistory, group: DomainGroup, x: Ints) -> tuple[Floats, Floats]:
    loss_sum, tokens = group_loss(group, history.domain_loss, history.domain_tokens)
    return weighted_means(x, loss_sum / np.maximum(tokens, 1), tokens)


def throughput_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw tokens per second over all ranks: median and range of neighbouring lines."""
    figure, axes = canvas.axes(metrics, "tokens per second, all ranks", tall=False)
    _draw_median_and_range(axes, metrics.progress_before(metrics.steps.step), metrics.steps.tokens_per_s, PALETTE[0])
    axes.set_ylim(0, max(float(np.percentile(metrics.steps.tokens_per_s, 99)) * 1.15, 1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    if canvas.wide:
        median = float(np.median(metrics.steps.tokens_per_s))
        canvas.label(axes, [f"{format_count(median)}  median"], [median], [PALETTE[0]])
    return figure


def data_wait_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw the share of step time that the slowest rank waited for data, on a logarithmic axis."""
    figure, axes = canvas.axes(metrics, "share of step time", tall=False)
    share = np.maximum(metrics.steps.data_wait_s / np.maximum(metrics.steps.step_s, 1e-9), MIN_SHARE)
    _draw_median_and_range(axes, metrics.progress_before(metrics.steps.step), share, PALETTE[3])
    axes.set_yscale("log")
    axes.set_ylim(MIN_SHARE, 1)
    axes.minorticks_off()
    axes.axhline(DATA_WAIT_GOAL, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    if canvas.wide:
        median = float(np.median(share))
        canvas.label(axes, [f"{format_percent(median)}  median"], [median], [PALETTE[3]])
    return figure


def communication_plot(metrics: RunMetrics, canvas: Canvas) -> Figure | None:
    """Draw the durations of planning, broadcasts and waits for reductions on rank 0; None if none was recorded."""
    # Zero has no logarithm. A chunk that was planned before a restart took no time to plan.
    all_series = (
        ("planning a chunk", PALETTE[4], metrics.comm.plan.positive()),
        ("broadcast", PALETTE[1], metrics.comm.broadcast.positive()),
        ("wait for reduction", PALETTE[0], metrics.comm.reduce.positive()),
    )
    recorded = [(name, color, series) for name, color, series in all_series if len(series.step)]
    if not recorded:
        return None

    figure, axes = canvas.axes(metrics, "time on rank 0")
    axes.set_yscale("log")
    for _, color, series in recorded:
        _draw_median_and_range(axes, metrics.progress_before(series.step), series.seconds, color)
    axes.yaxis.set_major_formatter(EngFormatter("s", sep=" "))
    axes.minorticks_off()

    medians = [float(np.median(series.seconds)) for _, _, series in recorded]
    names = [f"{format_seconds(median)}  {name}" for (name, _, _), median in zip(recorded, medians, strict=True)]
    canvas.label(axes, names, medians, [color for _, color, _ in recorded])
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot of the report: the function that draws it, and the text above it."""

    draw: Callable[[RunMetrics, Canvas], Figure | None]
    title: str
    caption: str


PLOTS: dict[str, Plot] = {
    "mixture": Plot(
        draw=mixture_plot,
        title="Mixture",
        caption="Weight of every domain, chunk by chunk. The percentages are those of the last chunk.",
    ),
    "loss": Plot(
        draw=loss_plot,
        title="Loss by domain",
        caption="Mean loss per counted token. The dashed line is the mean over all domains.",
    ),
    "validation": Plot(
        draw=validation_plot,
        title="Held-out loss by domain",
        caption="Mean loss per token of held-out samples, the same samples at every validation. "
        "The dashed line is the mean over all domains.",
    ),
    "throughput": Plot(
        draw=throughput_plot,
        title="Throughput",
        caption="Counted tokens per second over all ranks. The line is the median of neighbouring steps, "
        "the band spans their 5th to 95th percentile.",
    ),
    "data_wait": Plot(
        draw=data_wait_plot,
        title="Data wait",
        caption="Share of the step time that the slowest rank waited for its batch. The dashed line is 0.1 %.",
    ),
    "communication": Plot(
        draw=communication_plot,
        title="Communication",
        caption="Time to plan a chunk and to broadcast the plan, both in the background; and time that each step "
        "waited for the reduction of losses. The times beside the names are medians.",
    ),
}
"""File name → plot, in the order of the page."""


def _hide_initial_fall(axes: Any, curves: list[Floats]) -> None:
    """Limit the y axis to the losses after the first 1/40 of the run.

    The fall from the untrained loss would otherwise take most of the height.
    """
    high = max(float(loss[len(loss) // 40 :].max()) for loss in curves)
    low = min(float(loss.min()) for loss in curves)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.02 * (high - low) + 1e-3)


def _draw_median_and_range(axes: Any, x: Ints, values: Floats, color: str) -> None:
    """Draw the median of neighbouring values as a line, and their 5th to 95th percentile as a band."""
    centers, low, median, high = percentile_ranges(x, values)
    axes.fill_between(centers, low, high, color=color, alpha=0.22, lw=0)
    axes.plot(centers, median, color=color, **_marker(centers))


def _marker(x: Floats) -> dict[str, Any]:
    """Return the style that draws a curve of a single point as a dot; a line of one point is invisible."""
    return {"marker": "o", "markersize": 4, "clip_on": False} if len(x) == 1 else {}
