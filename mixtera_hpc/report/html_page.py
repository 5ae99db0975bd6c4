"""One HTML file that needs nothing else: styles and plots inside, no script, no network, light and dark, wide and narrow."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from mixtera_hpc.report.canvas import MAX_IN_LEGEND
from mixtera_hpc.report.commands import next_commands
from mixtera_hpc.report.domain_groups import bands_of, common_key, short_names
from mixtera_hpc.report.number_format import format_count, format_duration, format_percent, format_seconds
from mixtera_hpc.report.plot_style import DARK, LIGHT
from mixtera_hpc.report.projection import RunProjection
from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import DomainSummary, RunSummary

__all__ = ["Figures", "render_page"]

BY_DOMAIN = ("mixture", "loss", "validation")
"""Figures with one band or curve per domain."""
Figures = Mapping[str, tuple[str, str, str, str]]
"""Name → title, caption, wide `<svg>`, narrow `<svg>`."""


def render_page(record: RunMetrics, summary: RunSummary, ahead: RunProjection, figures: Figures) -> str:
    """The report of one run as HTML text."""
    parts = [
        _header(record, summary),
        _tiles(summary),
        *_notices(summary, ahead),
        *(_figure(record, name, *figure) for name, figure in figures.items() if name in BY_DOMAIN),
        _domains(record, summary, ahead),
        *(_figure(record, name, *figure) for name, figure in figures.items() if name not in BY_DOMAIN),
        _forecast(summary, ahead),
        _facts(record, summary),
        _next(record, summary),
        "<footer>Mixtera-HPC · numbers from <code>metrics/*.jsonl</code> of the run folder; each step is told once, by the "
        "last attempt that did it.</footer>",
    ]
    title = f"{summary.name} · {summary.run_id}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_styles()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _styles() -> str:
    css = resources.files("mixtera_hpc.report").joinpath("page.css").read_text()
    light = _variables({**LIGHT, "page": "#f5f6f8"})
    dark = _variables({**DARK, "page": "#0d0f12"})
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{css}"


def _variables(colors: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _header(record: RunMetrics, summary: RunSummary) -> str:
    done = (
        f"{format_count(summary.steps, 4)} of {format_count(summary.num_steps, 4)} steps"
        if summary.num_steps
        else "running"
    )
    attempts = f"{summary.num_attempts} attempt{'s' if summary.num_attempts != 1 else ''}"
    ranks = _ranks(summary)
    when = record.started[:16].replace("T", " ")
    return (
        f'<header><p class="over">Run report</p><h1>{escape(summary.name)}</h1>'
        f"<p>{escape(summary.run_id)} · {escape(when)} UTC · {done} · {attempts} · {ranks}</p></header>"
    )


def _tiles(summary: RunSummary) -> str:
    speed = summary.speed
    first = "nats per token" if summary.loss_first is None else f"nats, from {summary.loss_first:.2f}"
    validated = [("Held-out loss", f"{summary.held_out:.3f}", "nats, newest")] if summary.held_out is not None else []
    tiles = [
        ("Loss", "–" if summary.loss_last is None else f"{summary.loss_last:.3f}", first),
        *validated,
        ("Tokens", format_count(summary.tokens), f"in {format_duration(summary.train_s)} of steps"),
        (
            "Throughput",
            f"{format_count(speed.tokens_per_s)}/s",
            f"{format_count(speed.tokens_per_s / speed.num_ranks)}/s per rank",
        ),
        ("Step", format_seconds(speed.step_p50_s), f"p95 {format_seconds(speed.step_p95_s)}"),
        ("Waiting for data", format_percent(speed.data_wait_share), f"p99 {format_percent(speed.data_wait_p99_share)}"),
        ("Waiting for reductions", format_seconds(speed.reduce_p50_s), f"p95 {format_seconds(speed.reduce_p95_s)}"),
    ]
    cells = "".join(f'<div class="tile"><span>{t}</span><b>{v}</b><span>{n}</span></div>' for t, v, n in tiles)
    return f'<div class="tiles">{cells}</div>'


def _notices(summary: RunSummary, ahead: RunProjection) -> Iterable[str]:
    """What a reader must not miss."""
    if summary.num_nonfinite:
        yield _notice(
            f"{format_count(summary.num_nonfinite)} sequences had a loss that is not finite; they are left out of all losses."
        )
    exhausted = [d for d in ahead.domains if d.exhausted_at is not None]
    if exhausted and ahead.steps_left:
        first = min(exhausted, key=lambda d: d.exhausted_at or 0)
        yield _notice(
            f"{escape(first.name)} reaches mixture.max_epochs={ahead.max_epochs:g} around step "
            f"{format_count(first.exhausted_at, 4)}, before the run ends."
        )


def _notice(text: str) -> str:
    return f'<section class="notice"><p>{text}</p></section>'


def _figure(record: RunMetrics, name: str, title: str, caption: str, wide: str, narrow: str) -> str:
    legend = ""
    bands = bands_of(record)
    if name in BY_DOMAIN and len(bands) > (MAX_IN_LEGEND if name == "mixture" else MAX_IN_LEGEND - 1):
        items = "".join(f"<li>{_swatch(b.color)}{escape(b.name)}</li>" for b in bands)
        legend = f'<ul class="legend narrow">{items}</ul>'
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(caption)}</p>{legend}"
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div></section>'
    )


def _domains(record: RunMetrics, summary: RunSummary, ahead: RunProjection) -> str:
    color = {domain: band.color for band in bands_of(record) for domain in band.domains}
    key, names = common_key(record.domains), short_names(record.domains)
    validated = summary.held_out is not None
    rows = "".join(_domain_row(summary.domains[d], names[d], color[d], ahead.max_epochs, validated) for d in color)
    columns = ["weight", "served", "tokens", "epochs", "loss", *(["held out"] if validated else [])]
    head = _cells("th", [escape(key or "domain"), *columns])
    return (
        "<section><h2>Domains</h2><p>Weight and loss from the first step to the last; served is the share of all sequences, "
        "epochs the passes over a domain's data so far.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _domain_row(domain: DomainSummary, name: str, color: int, limit: float | None, validated: bool) -> str:
    epochs = "–" if domain.epochs is None else f"{domain.epochs:.2f}"
    if limit is not None and domain.epochs is not None and domain.epochs >= limit:
        epochs = f"<em>{epochs}</em>"
    cells = [
        f"{_swatch(color)}{escape(name)}",
        _change(_share(domain.weight_first), _share(domain.weight_last)),
        _share(domain.served),
        format_count(domain.tokens),
        epochs,
        _change(_loss(domain.loss_first), _loss(domain.loss_last)),
        *([_loss(domain.held_out)] if validated else []),
    ]
    return f"<tr>{_cells('td', cells)}</tr>"


def _forecast(summary: RunSummary, ahead: RunProjection) -> str:
    if ahead.steps_left == 0:
        text = "The run has done all its steps."
    else:
        text = (
            f"{format_count(ahead.steps_left, 4)} steps are left, about {format_duration(ahead.seconds_left)} at the median step; "
            f"{format_count(ahead.tokens)} tokens in the end."
        )
    most = [d for d in ahead.domains if d.epochs >= 1][:5]
    if most:
        named = ", ".join(f"{escape(d.name)} {d.epochs:.1f}" for d in most)
        text += f" Domains seen more than once by then, in passes over their data: {named}."
    return f"<section><h2>Forecast</h2><p>{text}</p></section>"


def _facts(record: RunMetrics, summary: RunSummary) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _fact_list(record, summary))
    return f"<section><h2>Run</h2><dl>{items}</dl></section>"


def _fact_list(record: RunMetrics, summary: RunSummary) -> list[tuple[str, str]]:
    config, last = record.config, record.attempts[-1] if record.attempts else {}
    mixture, plane = config.get("mixture", {}), config.get("dataplane", {})
    kind = str(mixture.get("kind", "–"))
    algorithm = mixture.get("algorithm", {}).get("name") if kind == "dynamic" else None
    speed = summary.speed
    facts = [
        ("Mixture", f"{kind} ({algorithm})" if algorithm else kind),
        ("Data", str(config.get("data", {}).get("root", "–"))),
        ("Query", str(config.get("query", {}).get("where") or "everything")),
        (
            "Global batch",
            f"{format_count(plane.get('global_batch_size'))} sequences × {format_count(plane.get('seq_len'))} tokens",
        ),
        ("Model", f"{format_count(last.get('num_parameters'))} parameters"),
        ("Ran on", f"{_ranks(summary)}, {last.get('device', '–')}"),
        ("Cluster", str(config.get("cluster", {}).get("name", "–"))),
        ("Planning a chunk", format_seconds(speed.plan_p50_s)),
        ("Broadcasting it", f"{format_seconds(speed.broadcast_p50_s)}; p95 {format_seconds(speed.broadcast_p95_s)}"),
        ("First batch after", format_seconds(speed.start_wait_s)),
        ("Last recorded", f"{record.ended[:19].replace('T', ' ')} UTC"),
        ("Folder", str(record.run.path)),
    ]
    return [(k, v) for k, v in facts if not v.startswith("–")]


def _next(record: RunMetrics, summary: RunSummary) -> str:
    lines = "\n".join(f"{escape(c)}  <u># {escape(why)}</u>" for c, why in next_commands(record.run, summary))
    return f"<section><h2>Next</h2><pre>{lines}</pre></section>"


def _ranks(summary: RunSummary) -> str:
    speed = summary.speed
    ranks = f"{speed.num_ranks} rank{'s' if speed.num_ranks != 1 else ''}"
    if speed.num_nodes is None:
        return ranks
    return f"{ranks} on {speed.num_nodes} node{'s' if speed.num_nodes != 1 else ''}"


def _cells(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{value}</{tag}>" for value in values)


def _change(first: str, last: str) -> str:
    return last if first == last else f"{first}<i>→</i>{last}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.2f}"


def _swatch(color: int) -> str:
    return f'<span class="swatch" style="background: var(--d{color})"></span>'
