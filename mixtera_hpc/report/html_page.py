"""The report as one self-contained HTML file: no scripts, no network, for light and dark, wide and narrow screens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from mixtera_hpc.errors import pluralize
from mixtera_hpc.report.domain_groups import group_domains
from mixtera_hpc.report.mixing.domain_names import common_property, shorten_names
from mixtera_hpc.report.mixing.learned_mixture import learned_section
from mixtera_hpc.report.number_format import (
    MISSING,
    format_count,
    format_duration,
    format_loss,
    format_percent,
    format_seconds,
    format_share,
)
from mixtera_hpc.report.phrases import (
    MAX_STALLS,
    SILENT_MIXTURE,
    describe_data_end,
    describe_progress,
    describe_ranks,
    describe_remaining,
    median_and_p95,
    next_commands,
    stall_cells,
)
from mixtera_hpc.report.plot_style import DARK, LIGHT, css_color, group_color
from mixtera_hpc.report.projection import RunProjection
from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import DomainSummary, RunSummary
from mixtera_hpc.report.timing.stage_limits import LIMIT_COLUMNS, limit_cells
from mixtera_hpc.report.timing.stalls import STALL_COLUMNS

__all__ = ["RenderedPlot", "page_text", "render_page", "table_text"]

MAX_ROWS = 30
"""Rows of the table of domains that are always visible."""

DOMAIN_PLOTS = ("mixture", "loss", "validation")
"""Plots with a band or a curve per domain group; the page shows them above the table of domains."""

LIGHT_PAGE = "#f5f6f8"
DARK_PAGE = "#0d0f12"
"""Background of the page around the sections."""

LIMITS_CAPTION = (
    "Throughput that every stage could sustain alone, on the slowest rank. The stages run beside each other, so the "
    "run is as fast as the slowest one."
)

FOOTER = (
    "<footer>Mixtera-HPC · All numbers come from <code>metrics/*.jsonl</code> in the run folder. If several attempts "
    "trained the same step, the last one counts.</footer>"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPlot:
    """A plot as `<svg>` elements, with the text above it."""

    title: str
    caption: str
    wide_svg: str
    narrow_svg: str
    legend: tuple[tuple[str, str], ...]
    """Name and color of every curve; the narrow plot has no labels."""


def render_page(
    metrics: RunMetrics,
    summary: RunSummary,
    projection: RunProjection,
    plots: Mapping[str, RenderedPlot],
    details: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the report of one run as HTML text; `details` are further labels and texts about the run."""
    domain_plots = [_plot(plot) for name, plot in plots.items() if name in DOMAIN_PLOTS]
    other_plots = [_plot(plot) for name, plot in plots.items() if name not in DOMAIN_PLOTS]
    body = [
        _header(metrics, summary),
        _tiles(summary),
        *_notices(summary, projection),
        *domain_plots,
        _domain_table(metrics, summary, projection),
        _limit_table(summary),
        *([_stall_table(summary)] if summary.stalls else []),
        learned_section(metrics.learned, [d for group in group_domains(metrics) for d in group.domains]),
        *other_plots,
        *([_projection(projection)] if summary.num_steps else []),
        _run_details([*_detail_list(metrics, summary), *details]),
        _next_commands(metrics, summary),
        FOOTER,
    ]
    return page_text(f"{summary.name} · {summary.run_id}", body)


def page_text(title: str, body: Sequence[str]) -> str:
    """Return a complete page without scripts, given its title as text and its parts as HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_page_styles()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _page_styles() -> str:
    """Return the style sheet of a page, for light and dark screens."""
    css = resources.files("mixtera_hpc.report").joinpath("page.css").read_text()
    light = _css_variables({**LIGHT, "page": LIGHT_PAGE})
    dark = _css_variables({**DARK, "page": DARK_PAGE})
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{css}"


def _css_variables(colors: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _header(metrics: RunMetrics, summary: RunSummary) -> str:
    started = metrics.started[:16].replace("T", " ")
    return (
        f'<header><p class="over">Run report</p><h1>{escape(summary.name)}</h1>'
        f"<p>{escape(summary.run_id)} · started {escape(started)} UTC · {describe_progress(summary)}</p></header>"
    )


def _tiles(summary: RunSummary) -> str:
    """Return the most important numbers: label, value, note."""
    performance = summary.performance
    loss_note = "nats per token"
    if summary.loss_first is not None:
        loss_note = f"nats/token, from {summary.loss_first:.2f}"
    tiles = [("Loss", format_loss(summary.loss_last, 3), loss_note)]
    if summary.held_out_loss is not None:
        tiles.append(("Held-out loss", format_loss(summary.held_out_loss, 3), "newest validation"))
    tiles += [
        ("Tokens", format_count(summary.tokens), f"in {format_duration(summary.train_s)} of training"),
        (
            "Tokens per second",
            format_count(performance.tokens_per_s),
            f"{format_count(performance.tokens_per_s_per_rank)} per rank",
        ),
        ("Step time", format_seconds(performance.step_p50_s), f"p95 {format_seconds(performance.step_p95_s)}"),
        (
            "Data wait",
            format_percent(performance.data_wait_share),
            f"of step time, p99 {format_percent(performance.data_wait_p99_share)}",
        ),
        (
            "Wait for reduction",
            format_seconds(performance.reduce_p50_s),
            f"per step, p95 {format_seconds(performance.reduce_p95_s)}",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><span>{label}</span><b>{value}</b><span>{note}</span></div>' for label, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _notices(summary: RunSummary, projection: RunProjection) -> Iterable[str]:
    """Yield warnings that a reader must not miss."""
    if summary.num_nonfinite:
        yield _notice(
            f"{pluralize(summary.num_nonfinite, 'sequence')} had a loss that is not finite (NaN or infinity). "
            "All losses of this report exclude them."
        )
    for warning in summary.warnings:
        yield _notice(escape(warning))
    if summary.hears_losses is False:
        yield _notice(f"The mixture is {SILENT_MIXTURE}. The training loop must call record() after every step.")
    if summary.data_end is not None:
        yield _notice(f"The data has ended. Left over: {escape(describe_data_end(summary.data_end))}.")
    exhausted = [domain for domain in projection.domains if domain.exhausted_at_step is not None]
    if exhausted and projection.remaining_steps:
        first = min(exhausted, key=lambda domain: domain.exhausted_at_step or 0)
        yield _notice(
            f"{escape(first.name)} reaches mixture.max_epochs={projection.max_epochs:g} around step "
            f"{format_count(first.exhausted_at_step, 4)}, before the run ends. "
            "mixture.on_exhausted decides what happens then."
        )


def _notice(text: str) -> str:
    return f'<section class="notice"><p>{text}</p></section>'


def _plot(plot: RenderedPlot) -> str:
    return (
        f"<section><h2>{escape(plot.title)}</h2><p>{escape(plot.caption)}</p>{_legend(plot)}"
        f'<div class="wide">{plot.wide_svg}</div><div class="narrow">{plot.narrow_svg}</div></section>'
    )


def _legend(plot: RenderedPlot) -> str:
    """Return the legend for narrow screens; empty for a plot of a single unnamed curve."""
    if not plot.legend:
        return ""
    items = "".join(f"<li>{_swatch(color)}{escape(name)}</li>" for name, color in plot.legend)
    return f'<ul class="legend narrow">{items}</ul>'


def _domain_table(metrics: RunMetrics, summary: RunSummary, projection: RunProjection) -> str:
    """Return the table of domains, largest first."""
    colors = {domain: group_color(group.color) for group in group_domains(metrics) for domain in group.domains}
    names = shorten_names(metrics.domains)
    with_held_out = summary.held_out_loss is not None

    columns = [escape(common_property(metrics.domains) or "domain"), "weight", "served", "tokens", "epochs", "loss"]
    if with_held_out:
        columns.append("held-out loss")
    rows = []
    for domain_id, color in colors.items():
        domain = summary.domains[domain_id]
        cells = [f"{_swatch(color)}{escape(names[domain_id])}", *_domain_cells(domain, projection.max_epochs)]
        if with_held_out:
            cells.append(format_loss(domain.held_out_loss))
        rows.append(f"<tr>{_cells('td', cells)}</tr>")
    return (
        '<section class="domains"><h2>Domains</h2><p>Weight and loss: first and last value. '
        "Served: share of all sequences so far. Epochs: passes over the data of the domain so far.</p>"
        f"{table_text(columns, rows[:MAX_ROWS])}{_further_rows(columns, rows[MAX_ROWS:])}</section>"
    )


def _further_rows(columns: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table that opens with a click; empty without rows."""
    if not rows:
        return ""
    return f"<details><summary>{pluralize(len(rows), 'smaller domain')}</summary>{table_text(columns, rows)}</details>"


def table_text(columns: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table, given the headings and the `<tr>` elements as HTML."""
    return (
        f'<div class="scroll"><table><thead><tr>{_cells("th", columns)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _limit_table(summary: RunSummary) -> str:
    """Return the throughput that each stage could sustain alone."""
    rows = [f"<tr>{_cells('td', map(escape, limit_cells(limit)))}</tr>" for limit in summary.limits]
    return f"<section><h2>Limits</h2><p>{LIMITS_CAPTION}</p>{table_text(LIMIT_COLUMNS, rows)}</section>"


def _stall_table(summary: RunSummary) -> str:
    """Return the ranks that kept the others waiting."""
    rows = [f"<tr>{_cells('td', map(escape, stall_cells(stall)))}</tr>" for stall in summary.stalls[:MAX_STALLS]]
    return (
        "<section><h2>Stalls</h2><p>Steps in which the trainer waited for the data plane, by the rank and stage that "
        f"kept the others waiting.</p>{table_text(STALL_COLUMNS, rows)}</section>"
    )


def _domain_cells(domain: DomainSummary, max_epochs: float | None) -> list[str]:
    epochs = MISSING if domain.epochs is None else f"{domain.epochs:.2f}"
    if max_epochs is not None and domain.epochs is not None and domain.epochs >= max_epochs:
        epochs = f"<em>{epochs}</em>"
    return [
        _change(format_share(domain.weight_first), format_share(domain.weight_last)),
        format_share(domain.served_share),
        format_count(domain.tokens),
        epochs,
        _change(format_loss(domain.loss_first), format_loss(domain.loss_last)),
    ]


def _projection(projection: RunProjection) -> str:
    text = describe_remaining(projection)
    repeated = [domain for domain in projection.domains if domain.epochs >= 1][:5]
    if repeated:
        domains = ", ".join(f"{escape(domain.name)} {domain.epochs:.1f}" for domain in repeated)
        text += f" Epochs of the most repeated domains at the end: {domains}."
    return f"<section><h2>Projection</h2><p>{text}</p></section>"


def _run_details(details: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in details
        if not value.startswith(MISSING)
    )
    return f"<section><h2>Run</h2><dl>{items}</dl></section>"


def _detail_list(metrics: RunMetrics, summary: RunSummary) -> list[tuple[str, str]]:
    config = metrics.config
    attempt = metrics.attempts[-1] if metrics.attempts else {}
    plane = config.get("dataplane", {})
    performance = summary.performance
    return [
        ("Mixture", _describe_mixture(config.get("mixture", {}))),
        ("Data", _describe_data(config.get("data", {}))),
        ("Query", str(config.get("query", {}).get("where") or "all samples")),
        ("Global batch", _describe_batch(plane)),
        ("Model", f"{format_count(attempt.get('num_parameters'))} parameters"),
        ("Hardware", f"{describe_ranks(performance)}, {attempt.get('device', MISSING)}"),
        ("Cluster", str(config.get("cluster", {}).get("name", MISSING))),
        ("Time to plan a chunk", format_seconds(performance.plan_p50_s)),
        ("Time to broadcast a plan", median_and_p95(performance.broadcast_p50_s, performance.broadcast_p95_s)),
        ("Wait for the first batches", format_seconds(performance.start_wait_s)),
        ("Last event", f"{metrics.ended[:19].replace('T', ' ')} UTC"),
        ("Run folder", str(metrics.run.path)),
    ]


def _describe_batch(plane: Mapping[str, Any]) -> str:
    sizes = [plane.get("global_batch_size"), *(stage.get("size") for stage in plane.get("batch_schedule") or [])]
    text = " → ".join(format_count(size) for size in sizes)
    return f"{text} sequences × {format_count(plane.get('seq_len'))} tokens"


def _describe_mixture(mixture: Mapping[str, object]) -> str:
    kind = str(mixture.get("kind", MISSING))
    algorithm = mixture.get("algorithm")
    if kind == "dynamic" and isinstance(algorithm, Mapping) and algorithm.get("name"):
        return f"{kind} ({algorithm['name']})"
    return kind


def _describe_data(data: Mapping[str, Any]) -> str:
    """Return the data root, or the root of every data set."""
    sets = data.get("sets") or {}
    if sets:
        return ", ".join(f"{name}: {data_set['root']}" for name, data_set in sets.items())
    return str(data.get("root") or MISSING)


def _next_commands(metrics: RunMetrics, summary: RunSummary) -> str:
    lines = "\n".join(
        f"{escape(command)}  <u># {escape(purpose)}</u>" for command, purpose in next_commands(metrics.run, summary)
    )
    return f"<section><h2>Next commands</h2><pre>{lines}</pre></section>"


def _cells(tag: str, values: Iterable[str]) -> str:
    return "".join(f"<{tag}>{value}</{tag}>" for value in values)


def _change(first: str, last: str) -> str:
    return last if first == last else f"{first}<i>→</i>{last}"


def _swatch(color: str) -> str:
    return f'<span class="swatch" style="background: {css_color(color)}"></span>'
