"""The page of a swarm as one self-contained HTML file: no scripts, no network, for light and dark screens."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import pluralize
from mixtera_hpc.report.html_page import page_text, table_text
from mixtera_hpc.report.mixing.domain_names import common_property, shorten_names
from mixtera_hpc.report.number_format import MISSING, format_count, format_loss, format_share
from mixtera_hpc.report.plot_style import css_color, to_svg, use_plot_style
from mixtera_hpc.swarm.swarm_fit import SwarmFit, finite_or_none
from mixtera_hpc.swarm.swarm_folder import SwarmFolder
from mixtera_hpc.swarm.swarm_plots import CHECK_COLORS, CHECK_NAMES, SWARM_PLOTS, SwarmPlot, legend_of, short_names
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["swarm_page"]

Array = NDArray[np.float64]

MAX_METRICS = 40
"""Metrics with a column of effects; those with the largest effects."""
MAX_NAMES = 5
"""Domain names in a sentence."""
UNSURE = 0.9
"""Below this share of resamples, a gain over the natural mixture is called uncertain."""
WEAK = 0.7
"""A regression whose error is above this fraction of that of a constant is called weak."""


def swarm_page(folder: SwarmFolder, fit: SwarmFit) -> str:
    """Return the page as HTML text."""
    body = [
        _header(folder, fit),
        _tiles(fit),
        *(f'<section class="notice"><p>{text}</p></section>' for text in _notices(folder, fit)),
        *_plots(fit, ("shares", "predicted")),
        _check_table(fit),
        *_plots(fit, ("sensitivity",)),
        _domain_table(fit),
        _effect_table(fit),
        _regression_table(fit),
        _next_commands(folder),
        f"<footer>Mixtera-HPC · All numbers come from <code>{escape(folder.ratios.name)}</code>, "
        f"<code>{escape(folder.metrics.name)}</code> and the runs of the swarm.</footer>",
    ]
    return page_text(f"Swarm {folder.name}", body)


def _header(folder: SwarmFolder, fit: SwarmFit) -> str:
    facts = (
        pluralize(len(fit.measured.runs), "run"),
        pluralize(len(fit.record.names), "domain"),
        *([pluralize(fit.record.num_phases, "phase")] if fit.record.num_phases > 1 else []),
        pluralize(len(fit.measured.metrics), "metric"),
        f"regression: {', '.join(sorted({law.name for law in fit.chosen.laws}))}",
    )
    return f'<header><p class="over">Swarm</p><h1>{escape(folder.name)}</h1><p>{" · ".join(facts)}</p></header>'


def _tiles(fit: SwarmFit) -> str:
    """Return the most important numbers: label, value, note."""
    measured = fit.measured_check(2)
    natural = fit.measured_check(0)
    gain = float(fit.predicted[0] - fit.predicted[2])
    tiles = [
        ("Predicted loss", f"{fit.predicted[2]:.3f}", f"± {fit.uncertainty.deviation[0]:.3f} over resampled runs"),
        ("Predicted gain", f"{gain:.3f}", "nats, over the natural mixture"),
        ("Measured loss", format_loss(measured, 3), "of the proposal, in a run of its own"),
    ]
    if measured is not None and natural is not None:
        tiles.append(("Measured gain", f"{natural - measured:.3f}", "nats, over the natural mixture"))
    tiles += [
        ("Error", f"{fit.chosen.rmse:.3f}", f"nats, cross-validated; constant: {fit.constant_rmse:.3f}"),
        ("Rank correlation", format_loss(finite_or_none(fit.chosen.rank_correlation), 2), "predicted and measured"),
    ]
    cells = "".join(
        f'<div class="tile"><span>{label}</span><b>{value}</b><span>{note}</span></div>' for label, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _notices(folder: SwarmFolder, fit: SwarmFit) -> Iterable[str]:
    """Yield warnings as HTML text, one or two sentences each."""
    if fit.chosen.rmse > WEAK * fit.constant_rmse:
        yield (
            f"The regression predicts little: its error is {fit.chosen.rmse / max(fit.constant_rmse, 1e-12):.0%} of "
            "that of a constant. Train more proxies, or longer ones, before believing the proposal."
        )
    probability = float(fit.uncertainty.gain_probability[1])
    if probability < UNSURE:
        yield (
            f"The gain over the natural mixture is uncertain: it appears in {probability:.0%} of the fits to resampled "
            "runs."
        )
    measured, natural, uniform = (fit.measured_check(place) for place in (2, 0, 1))
    if measured is None:
        yield (
            f"The proposal is not verified. Train it beside the natural and the uniform mixture: <code>mixtera-hpc "
            f"swarm train {escape(folder.name)} --check</code>, then fit again."
        )
    elif any(other is not None and other < measured for other in (natural, uniform)):
        yield "The proposal is worse than the natural or the uniform mixture in a run of its own. Do not use it."
    names = short_names(fit)
    edges = [names[domain] for domain in fit.at_edge()]
    if edges:
        yield (
            f"The proposed share of {escape(', '.join(edges[:MAX_NAMES]))} is the smallest or largest that the proxies "
            "measured. The best mixture may lie beyond: add proxies with a larger swarm.num_proxies, or sample another "
            "swarm with a smaller swarm.concentration."
        )
    if fit.record.num_phases > 1 and not fit.record.starts_in_tokens:
        yield (
            "The phases of the proposal begin at the steps of the proxies. Scale <code>start</code> for the final run, "
            "or sample with swarm.target_tokens, which writes them in tokens of that run."
        )
    if fit.num_unfinished:
        yield f"{pluralize(fit.num_unfinished, 'proxy run')} had no losses when this page was made."


def _plots(fit: SwarmFit, names: Sequence[str]) -> list[str]:
    with use_plot_style():
        return [_plot(fit, SWARM_PLOTS[name]) for name in names]


def _plot(fit: SwarmFit, plot: SwarmPlot) -> str:
    narrow = plot.draw(fit, False)
    legend = "".join(f"<li>{_swatch(color)}{escape(label)}</li>" for label, color in legend_of(narrow))
    return (
        f"<section><h2>{escape(plot.title)}</h2><p>{escape(plot.caption)}</p>"
        + (f'<ul class="legend{"" if plot.has_legend else " narrow"}">{legend}</ul>' if legend else "")
        + f'<div class="wide">{to_svg(plot.draw(fit, True), plot.title)}</div>'
        + f'<div class="narrow">{to_svg(narrow, plot.title)}</div></section>'
    )


def _check_table(fit: SwarmFit) -> str:
    """Return predicted and measured losses of the proposal and of the mixtures that it is compared with."""
    rows = []
    # The uncertainty has the proposal first, the checks have it last.
    for order, place in enumerate((2, 0, 1)):
        deviation = float(fit.uncertainty.deviation[order])
        probability = float(fit.uncertainty.gain_probability[order])
        rows.append(
            [
                f"{_swatch(CHECK_COLORS[place])}{CHECK_NAMES[place]}",
                f"{fit.predicted[place]:.4f}",
                format_loss(fit.measured_check(place), 4),
                f"{deviation:.4f}",
                MISSING if place == 2 else f"{probability:.0%}",
            ]
        )
    columns = ("mixture", "predicted loss", "measured loss", "deviation", "proposal better")
    return _table(
        "Check",
        "Mean loss over the metrics, in nats. Deviation: over fits to resampled runs. Proposal better: share of these "
        "fits in which the proposal has the smaller loss. Measured: in runs that no fit has seen.",
        columns,
        rows,
    )


def _domain_table(fit: SwarmFit) -> str:
    record = fit.record
    slopes = fit.fit.gradient(fit.proposal) @ (fit.measured.objective / fit.measured.objective.sum())
    effect = _effects(fit, slopes)
    names = short_names(fit)
    rows = []
    for domain in np.argsort(-fit.proposal, kind="stable").tolist():
        low = float(fit.measured.mixtures[:, domain].min())
        high = float(fit.measured.mixtures[:, domain].max())
        rows.append(
            [
                escape(names[domain]),
                format_share(float(fit.proposal[domain])),
                format_share(float(fit.checks.mixtures[0, domain])),
                format_share(float(record.high[domain])),
                f"{format_share(low)} – {format_share(high)}",
                f"{effect[domain]:+.2f}",
                _epochs(fit, domain),
                format_count(int(record.sizes[domain % len(record.names)])),
            ]
        )
    columns = (
        *(escape(common_property(record.names) or "domain"), "proposed", "natural", "at most", "measured range"),
        *("effect of 1 % more", "epochs", record.config.mixture.unit),
    )
    return _table(
        "Domains",
        "At most: cap and limit of epochs. Effect of 1 % more: change of the predicted mean loss at the proposal, in "
        "thousandths of a nat, if the others shrink in proportion. Epochs: in the run that the mixture is for "
        "(swarm.target_tokens).",
        columns,
        rows,
    )


def _epochs(fit: SwarmFit, place: int) -> str:
    """Return the passes over a domain in its phase of the final run."""
    phase, domain = divmod(place, len(fit.record.names))
    size = int(fit.record.sizes[domain])
    target = fit.record.config.swarm.target_tokens
    if target is None or not size:
        return MISSING
    return f"{float(fit.proposal[place]) * float(fit.record.phases[phase]) * target / size:.2f}"


def _effects(fit: SwarmFit, slopes: Array) -> Array:
    """Return the change of losses by 1 % more of each domain, if the others of its phase shrink in proportion.

    Args:
        fit: the fit, whose proposal is the point of the derivatives.
        slopes: derivatives of one or more losses by the shares; shape (C,) or (C, M), nats.

    Returns:
        Thousandths of a nat; shape of `slopes`.
    """
    by_metric = by_phase(slopes.T, fit.record.num_phases)
    shares = by_phase(fit.proposal, fit.record.num_phases)
    mean = (by_metric * shares).sum(axis=-1, keepdims=True)
    effects: Array = 10 * (by_metric - mean) / np.maximum(1 - shares, 1e-9)
    return effects.reshape(slopes.T.shape).T


def _effect_table(fit: SwarmFit) -> str:
    """Return the change of every metric by one more percent of each domain."""
    effect = _effects(fit, fit.fit.gradient(fit.proposal))
    shown = np.sort(np.argsort(-np.abs(effect).max(axis=0), kind="stable")[:MAX_METRICS])
    metric_names = shorten_names(fit.measured.metrics)
    names = short_names(fit)
    rows = [
        [escape(names[domain]), *(f"{effect[domain, metric]:+.1f}" for metric in shown.tolist())]
        for domain in np.argsort(-fit.proposal, kind="stable").tolist()
    ]
    return _table(
        "Effect of each domain on each metric",
        "Change of the predicted loss of a metric (columns) at the proposal, in thousandths of a nat, for 1 % more of "
        "a domain (rows). Negative: the domain helps.",
        ("domain", *(escape(metric_names[metric]) for metric in shown.tolist())),
        rows,
    )


def _regression_table(fit: SwarmFit) -> str:
    rows = []
    for name, candidate in (*((each.laws[0].name, each) for each in fit.validated), ("chosen", fit.chosen)):
        chosen_for = sum(law.name == name for law in fit.chosen.laws)
        rows.append(
            [
                name,
                f"{candidate.rmse:.4f}",
                format_loss(finite_or_none(candidate.objective_rmse), 4),
                format_loss(finite_or_none(candidate.rank_correlation), 2),
                f"{len(fit.chosen.laws) if candidate is fit.chosen else chosen_for}",
            ]
        )
    rows.append(["constant", f"{fit.constant_rmse:.4f}", MISSING, MISSING, MISSING])
    return _table(
        "Regressions",
        "Errors of predictions for runs that were left out, in nats: of all metrics, and of their mean. Every metric "
        "takes the law with its smallest error.",
        ("law", "error", "error of the mean", "rank correlation", "metrics"),
        rows,
    )


def _next_commands(folder: SwarmFolder) -> str:
    path = escape(str(folder.path))
    lines = "\n".join(
        (
            f"mixtera-hpc swarm train {path} --check  <u># trains the proposal beside natural and uniform</u>",
            f"MIXTERA_CONF={path} mixtera-hpc plan … mixture={escape(folder.proposal_name)}  <u># what it serves</u>",
            f"MIXTERA_CONF={path} mixtera-hpc submit … mixture={escape(folder.proposal_name)}",
        )
    )
    return f"<section><h2>Next commands</h2><pre>{lines}</pre></section>"


def _table(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table_rows = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<section><h2>{title}</h2><p>{caption}</p>{table_text(columns, table_rows)}</section>"


def _swatch(color: str) -> str:
    return f'<span class="swatch" style="background: {css_color(color)}"></span>'
