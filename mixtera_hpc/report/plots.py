"""The plots of a report. Each function draws one figure from a record."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.domain_groups import Band, bands_of, merged_loss, merged_sum
from mixtera_hpc.report.downsample import even_indices, percentile_ranges, weighted_means
from mixtera_hpc.report.number_format import format_seconds
from mixtera_hpc.report.plot_style import INK, MUTED, PALETTE, SURFACE, group_color
from mixtera_hpc.report.run_metrics import Floats, Ints, RunMetrics, StepHistory, ValidationHistory

__all__ = [
    "PLOTS",
    "communication_plot",
    "data_wait_plot",
    "loss_plot",
    "mixture_plot",
    "throughput_plot",
    "validation_plot",
]


def mixture_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """The weights of every chunk, stacked; None when they were not recorded, or there is only one domain."""
    if not len(record.mixture.step) or len(record.domains) == 1:
        return None
    bands = bands_of(record)
    shares = merged_sum(bands, record.mixture.weights)
    some = even_indices(len(shares))
    x = np.append(record.mixture.step[some], record.steps.step[-1] + 1)
    shares = np.vstack([shares[some], shares[-1:]])
    figure, axes = canvas.axes(record, "weight")
    colors = [group_color(band.color) for band in bands]
    axes.stackplot(x, shares.T, colors=colors, edgecolor=SURFACE, linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.grid(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    middle = np.cumsum(shares[-1]) - shares[-1] / 2
    names = [f"{share:5.1%}  {band.name}" for band, share in zip(bands, shares[-1], strict=True)]
    canvas.label(axes, names, middle.tolist(), colors)
    return figure


def loss_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """Mean token loss of every band and of all tokens."""
    return _losses(record, canvas, record.steps)


def validation_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """The same on held-out samples; None when nothing was validated."""
    return _losses(record, canvas, record.validation) if len(record.validation.step) else None


def _losses(record: RunMetrics, canvas: Canvas, lines: StepHistory | ValidationHistory) -> Figure:
    figure, axes = canvas.axes(record, "loss, nats per token")
    curves = [(band.name, group_color(band.color), *_band_loss(lines, band)) for band in bands_of(record)]
    if len(record.domains) > 1:
        all_tokens = lines.domain_tokens.sum(axis=1).astype(np.float64)
        curves.append(("all", INK, *weighted_means(lines.step, lines.loss, all_tokens)))
    curves = [curve for curve in curves if len(curve[2])]
    for name, color, x, loss in curves:
        dashes = (0, (4, 2)) if name == "all" else "-"
        axes.plot(x, loss, color=color, ls=dashes, **_dot(x))
    if curves:
        _leave_out_the_fall(axes, [loss for *_, loss in curves])
    names = [f"{loss[-1]:.2f}  {name}" for name, _, _, loss in curves]
    canvas.label(axes, names, [float(loss[-1]) for *_, loss in curves], [color for _, color, *_ in curves])
    return figure


def throughput_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """Tokens per second: the median of neighbouring lines and their range."""
    figure, axes = canvas.axes(record, "tokens per second, all ranks", labels=False)
    _median_in_band(axes, record.steps.step, record.steps.tokens_per_s, PALETTE[0])
    axes.set_ylim(0, max(float(np.percentile(record.steps.tokens_per_s, 99)) * 1.15, 1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def data_wait_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """Waiting for a batch as a share of step time, on a logarithmic scale down to 0.001 %."""
    figure, axes = canvas.axes(record, "waiting for data, share of step time", labels=False)
    share = np.maximum(record.steps.data_wait_s / np.maximum(record.steps.step_s, 1e-9), 1e-5)
    _median_in_band(axes, record.steps.step, share, PALETTE[3])
    axes.set_yscale("log")
    axes.set_ylim(1e-5, 1)
    axes.minorticks_off()
    axes.axhline(1e-3, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    return figure


def communication_plot(record: RunMetrics, canvas: Canvas) -> Figure | None:
    """Durations of plans, broadcasts and reductions on rank 0; None when none was recorded."""
    series = {
        "plan": record.talk.plan,
        "broadcast": record.talk.broadcast,
        "waiting for reductions": record.talk.reduce,
    }
    series = {name: pair for name, pair in series.items() if len(pair[0])}
    if not series:
        return None
    figure, axes = canvas.axes(record, "seconds on rank 0")
    colors = dict(
        zip(("plan", "broadcast", "waiting for reductions"), (PALETTE[4], PALETTE[1], PALETTE[0]), strict=True)
    )
    axes.set_yscale("log")
    for name, (x, seconds) in series.items():
        _median_in_band(axes, x, np.maximum(seconds, 1e-7), colors[name])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axes.minorticks_off()
    medians = {name: float(np.median(seconds)) for name, (_, seconds) in series.items()}
    names = [f"{name}  {format_seconds(median)}" for name, median in medians.items()]
    canvas.label(axes, names, list(medians.values()), [colors[name] for name in medians])
    return figure


PLOTS: dict[str, tuple[Callable[[RunMetrics, Canvas], Figure | None], str, str]] = {
    "mixture": (
        mixture_plot,
        "Mixture",
        "The weight of every domain, chunk by chunk; percentages are the last chunk's.",
    ),
    "loss": (loss_plot, "Loss by domain", "Mean loss per counted token; a dashed line is all domains together."),
    "validation": (
        validation_plot,
        "Held-out loss by domain",
        "Mean loss per token of samples that training never sees, the same ones every time; dashed is all together.",
    ),
    "throughput": (throughput_plot, "Throughput", "Counted tokens per second over all ranks."),
    "data_wait": (
        data_wait_plot,
        "Waiting for data",
        "How much of each step rank 0 waited for its batch; dashed is a thousandth.",
    ),
    "communication": (
        communication_plot,
        "Communication",
        "Planning a chunk and broadcasting it, beside training; and what each step waited for the reduction of losses.",
    ),
}
"""Name of the file → the function, its title, and a sentence that says what is seen."""


def _band_loss(lines: StepHistory | ValidationHistory, band: Band) -> tuple[Floats, Floats]:
    loss_sum, tokens = merged_loss(band, lines.domain_loss, lines.domain_tokens)
    return weighted_means(lines.step, loss_sum / np.maximum(tokens, 1), tokens)


def _leave_out_the_fall(axes: Any, curves: list[Floats]) -> None:
    """The first fortieth of a run falls from the untrained loss; a scale that holds it shows nothing else."""
    high = max(float(loss[len(loss) // 40 :].max()) for loss in curves)
    low = min(float(loss.min()) for loss in curves)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.02 * (high - low) + 1e-3)


def _median_in_band(axes: Any, x: Ints, values: Floats, color: str) -> None:
    """The median of neighbouring lines, and faintly the range of nine tenths of them."""
    place, low, middle, high = percentile_ranges(x, values)
    axes.fill_between(place, low, high, color=color, alpha=0.22, lw=0)
    axes.plot(place, middle, color=color, **_dot(place))


def _dot(x: Floats) -> dict[str, Any]:
    """A curve of one point is a dot."""
    return {"marker": "o", "markersize": 4, "clip_on": False} if len(x) == 1 else {}
