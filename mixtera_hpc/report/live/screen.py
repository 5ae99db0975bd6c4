"""Format a snapshot of a run as lines of a terminal. Control characters in names of domains are escaped."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from mixtera_hpc.errors import pluralize
from mixtera_hpc.report.live.run_view import DomainView, Snapshot
from mixtera_hpc.report.number_format import (
    MISSING,
    format_count,
    format_duration,
    format_loss,
    format_percent,
    format_seconds,
    format_share,
)
from mixtera_hpc.report.safe_text import escape_controls

__all__ = ["Headline", "screen_lines"]

BAR_COLUMNS = 24
MAX_STAGES = 4
MIN_NAME_COLUMNS = 12
COLUMNS = ("weight", "served", "loss", "change")
COLUMN_WIDTH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Name and job of a run, which are not in its metrics."""

    run: str
    state: str
    reason: str | None
    job_id: str | None
    elapsed_s: int | None


def screen_lines(headline: Headline, snapshot: Snapshot, *, columns: int, rows: int | None) -> list[str]:
    """Return lines of at most `columns` columns; if `rows` is given, at most that many: domains are left out."""
    head = [line for parts in (*_head(headline, snapshot), *_speed(snapshot)) for line in _joined(parts, columns)]
    lines = [*head, "", *_domain_table(snapshot, columns)]
    if rows is not None and len(lines) > rows:
        num_hidden = len(lines) - rows + 1
        lines = [*lines[: rows - 1], f"… and {num_hidden} more domains; enlarge the terminal to see them"]
    return [_fit(line, columns).rstrip() for line in lines]


def _head(headline: Headline, snapshot: Snapshot) -> list[list[str]]:
    """Return the parts of every line."""
    parts = [headline.run, headline.state]
    if snapshot.attempt is not None:
        parts.append(f"attempt {snapshot.attempt}")
    if headline.job_id is not None:
        parts.append(f"job {headline.job_id}")
    if snapshot.num_ranks is not None:
        parts.append(pluralize(snapshot.num_ranks, "rank"))
    if headline.elapsed_s is not None:
        parts.append(f"runs for {format_duration(headline.elapsed_s)}")
    return [parts, [headline.reason.splitlines()[0]]] if headline.reason else [parts]


def _speed(snapshot: Snapshot) -> list[list[str]]:
    """Return the parts of every line."""
    if not snapshot.steps_done:
        return [["No step has been recorded yet."]]
    progress = f"step {snapshot.steps_done}"
    if snapshot.num_steps:
        share = min(snapshot.steps_done / snapshot.num_steps, 1.0)
        filled = round(BAR_COLUMNS * share)
        bar = "#" * filled + "-" * (BAR_COLUMNS - filled)
        progress = f"[{bar}] step {snapshot.steps_done} of {snapshot.num_steps} ({format_share(share)})"
    loss = f"loss {format_loss(snapshot.loss, 4)}"
    if snapshot.held_out_loss is not None:
        loss += f", held-out {format_loss(snapshot.held_out_loss, 4)}"
    speed = [
        loss,
        f"{format_count(snapshot.tokens_per_s)} tokens/s",
        f"{format_seconds(snapshot.step_s)} per step",
        f"waits for data {format_percent(snapshot.wait_share)}",
    ]
    slowest = [
        f"{slow.stage} {format_seconds(slow.seconds)} (rank {slow.rank}{f' on {slow.host}' if slow.host else ''})"
        for slow in snapshot.slowest[:MAX_STAGES]
    ]
    lines = [[progress, f"{format_duration(snapshot.remaining_s)} left"], speed]
    return [*lines, ["slowest ranks", *slowest]] if slowest else lines


def _joined(parts: Sequence[str], columns: int) -> list[str]:
    """Return the parts with dots between them, on as many lines of `columns` columns as they need."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        if cell_len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(f"  {part}")
    return lines


def _domain_table(snapshot: Snapshot, columns: int) -> list[str]:
    if not snapshot.domains:
        return []
    longest = max(len(escape_controls(domain.name)) for domain in snapshot.domains)
    numbers = len(COLUMNS) * COLUMN_WIDTH
    width = max(MIN_NAME_COLUMNS, min(longest, columns - numbers))
    title = "domain" if snapshot.chunk is None else f"domain (chunk {snapshot.chunk})"
    # The heaviest domains come first: a small terminal shows only some.
    ordered = sorted(snapshot.domains, key=lambda domain: -(domain.weight or 0.0))
    return [
        _row(title, COLUMNS, max(width, len(title))),
        *(_row(domain.name, _cells(domain), max(width, len(title))) for domain in ordered),
    ]


def _cells(domain: DomainView) -> list[str]:
    change = MISSING
    if domain.loss is not None and domain.loss_before is not None:
        change = f"{domain.loss - domain.loss_before:+.4f}"
    return [format_share(domain.weight), format_share(domain.served), format_loss(domain.loss, 4), change]


def _row(name: str, cells: Sequence[str], width: int) -> str:
    return _fit(name, width) + "".join(cell.rjust(COLUMN_WIDTH) for cell in cells)


def _fit(text: str, columns: int) -> str:
    """Return `text` cut or padded to `columns` columns, with its control characters shown."""
    return set_cell_size(escape_controls(text).replace("\n", " ").replace("\t", " "), columns)
