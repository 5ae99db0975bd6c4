"""The numbers of a report, from a record; no text, no plots.

Timings leave out the line each attempt began with: its pipeline was still filling. That wait is reported by itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.report.run_metrics import Floats, Ints, RunMetrics

__all__ = ["DomainSummary", "RunPerformance", "RunSummary", "summarize_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSummary:
    """One domain, from the first step to the last; None where nothing was recorded."""

    domain_id: int
    name: str
    tokens: int
    """Counted tokens."""
    served: float
    """Share of all sequences served."""
    weight_first: float | None
    weight_last: float | None
    epochs: float | None
    """Passes over the domain's data when the last chunk began."""
    loss_first: float | None
    loss_last: float | None
    """Over the last twentieth of the run, at least 1 line and at most 50, weighted by tokens."""
    held_out: float | None
    """Loss of the newest validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPerformance:
    """How fast steps went with the last attempt's number of ranks; seconds on rank 0."""

    num_ranks: int
    num_nodes: int | None
    tokens_per_s: float
    """Median."""
    step_p50_s: float
    step_p95_s: float
    data_wait_share: float
    """Of all step time."""
    data_wait_p99_share: float
    """Of each line's step time, its 99th percentile."""
    start_wait_s: float
    """Longest wait for the first batch of an attempt."""
    plan_p50_s: float | None
    broadcast_p50_s: float | None
    broadcast_p95_s: float | None
    reduce_p50_s: float | None
    reduce_p95_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run."""

    name: str
    run_id: str
    steps: int
    """Done."""
    num_steps: int
    """Asked for."""
    num_attempts: int
    tokens: int
    loss_first: float | None
    loss_last: float | None
    held_out: float | None
    """Loss of the newest validation; None when there was none."""
    num_nonfinite: int
    """Sequences whose loss was not finite."""
    train_s: float
    """Time in steps that count."""
    speed: RunPerformance
    domains: tuple[DomainSummary, ...]


def summarize_run(record: RunMetrics) -> RunSummary:
    """All numbers of one run."""
    steps = record.steps
    attempts = {*steps.attempt.tolist(), *(a.get("attempt", 1) for a in record.attempts)}
    total = steps.domain_tokens.sum(axis=1)
    return RunSummary(
        name=record.run.name,
        run_id=record.run.run_id,
        steps=int(steps.step[-1]) + 1,
        num_steps=record.num_steps,
        num_attempts=len(attempts),
        tokens=int(steps.tokens.sum()),
        loss_first=_first(steps.loss),
        loss_last=_last(steps.loss, total),
        held_out=_newest(record.validation.loss),
        num_nonfinite=int(steps.num_nonfinite.sum()),
        train_s=float((steps.step_s * steps.num_steps).sum()),
        speed=_speed(record),
        domains=tuple(_domain(record, i) for i in range(len(record.domains))),
    )


def _domain(record: RunMetrics, domain_id: int) -> DomainSummary:
    steps, mixture = record.steps, record.mixture
    loss, tokens = steps.domain_loss[:, domain_id], steps.domain_tokens[:, domain_id]
    recorded = len(mixture.step) > 0
    return DomainSummary(
        domain_id=domain_id,
        name=record.domains[domain_id],
        tokens=int(tokens.sum()),
        served=float(steps.domain_sequences[:, domain_id].sum() / max(steps.domain_sequences.sum(), 1)),
        weight_first=float(mixture.weights[0, domain_id]) if recorded else None,
        weight_last=float(mixture.weights[-1, domain_id]) if recorded else None,
        epochs=float(mixture.epochs[-1, domain_id]) if recorded else None,
        loss_first=_first(loss),
        loss_last=_last(loss, tokens),
        held_out=_newest(record.validation.domain_loss[:, domain_id]),
    )


def _speed(record: RunMetrics) -> RunPerformance:
    steps, talk = record.steps, record.talk
    num_ranks = int(steps.num_ranks[-1])
    mine = steps.num_ranks == num_ranks
    begins = mine & steps.opens_attempt
    steady = mine & ~steps.opens_attempt
    if not steady.any():
        steady = mine
    wait_share = steps.data_wait_s[steady] / np.maximum(steps.step_s[steady], 1e-9)
    total_s = (steps.step_s * steps.num_steps)[steady].sum()
    nodes = [a.get("num_nodes") for a in record.attempts if a.get("num_ranks") == num_ranks]
    return RunPerformance(
        num_ranks=num_ranks,
        num_nodes=int(nodes[-1]) if nodes and nodes[-1] is not None else None,
        tokens_per_s=float(np.median(steps.tokens_per_s[steady])),
        step_p50_s=float(np.percentile(steps.step_s[steady], 50)),
        step_p95_s=float(np.percentile(steps.step_s[steady], 95)),
        data_wait_share=float((steps.data_wait_s * steps.num_steps)[steady].sum() / max(total_s, 1e-9)),
        data_wait_p99_share=float(np.percentile(wait_share, 99)),
        start_wait_s=float((steps.data_wait_s * steps.num_steps)[begins].max(initial=0.0)),
        plan_p50_s=_percentile(talk.plan, 50),
        broadcast_p50_s=_percentile(talk.broadcast, 50),
        broadcast_p95_s=_percentile(talk.broadcast, 95),
        reduce_p50_s=_percentile(talk.reduce, 50),
        reduce_p95_s=_percentile(talk.reduce, 95),
    )


def _percentile(series: tuple[Ints, Floats], q: float) -> float | None:
    return float(np.percentile(series[1], q)) if len(series[1]) else None


def _first(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) else None


def _newest(values: Floats) -> float | None:
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def _last(values: Floats, tokens: NDArray[np.int64]) -> float | None:
    """Mean of the end, weighted by tokens; of the last known value where the end has none."""
    known = np.flatnonzero(np.isfinite(values) & (tokens > 0))
    if not len(known):
        return None
    window = known[known >= len(values) - min(max(len(values) // 20, 1), 50)]
    chosen = window if len(window) else known[-1:]
    return float(np.average(values[chosen], weights=tokens[chosen]))
