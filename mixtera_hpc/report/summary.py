"""The numbers of a report, computed from the metrics of a run.

Timings leave out the first line of each attempt, because its steps waited for the first batches. That wait is reported
separately, as `start_wait_s`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import list_names
from mixtera_hpc.report.mixing.learned_mixture import learned_notices
from mixtera_hpc.report.run_metrics import Floats, RunMetrics, TimeSeries
from mixtera_hpc.report.timing.stage_limits import StageLimit, stage_limits, wait_notices
from mixtera_hpc.report.timing.stalls import Stall

__all__ = ["DomainSummary", "RunPerformance", "RunSummary", "summarize_run"]

MAX_NAMES = 5
"""Domain names listed in a sentence."""

MIN_SECONDS = 1e-9
"""Lower bound of a divisor that is a duration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSummary:
    """One domain, from the first step to the last; None for what was not recorded."""

    domain_id: int
    name: str
    tokens: int
    """Counted tokens."""
    served_share: float
    """Share of all served sequences."""
    weight_first: float | None
    """Requested weight in the first chunk."""
    weight_last: float | None
    """Requested weight in the last chunk."""
    epochs: float | None
    """Passes over the domain's data when the last chunk began."""
    loss_first: float | None
    loss_last: float | None
    """Mean over the last twentieth of the run, at least 1 line and at most 50, weighted by tokens."""
    held_out_loss: float | None
    """Loss of the newest validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPerformance:
    """Throughput and timings with the number of ranks of the last attempt; seconds are measured on rank 0."""

    num_ranks: int
    num_nodes: int | None
    tokens_per_s: float
    """Median."""
    step_p50_s: float
    step_p95_s: float
    data_wait_share: float
    """Share of the total step time that the trainer waited for data."""
    data_wait_p99_share: float
    """99th percentile of the same share per line."""
    start_wait_s: float
    """Longest wait for the first batches of an attempt."""
    plan_p50_s: float | None
    broadcast_p50_s: float | None
    broadcast_p95_s: float | None
    reduce_p50_s: float | None
    reduce_p95_s: float | None

    @property
    def tokens_per_s_per_rank(self) -> float:
        return self.tokens_per_s / self.num_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class DataEnd:
    """Sequences and tokens that are left over at the end of the data."""

    unit: str
    """`tokens` or `samples`."""
    is_padded: bool
    """True if one more batch, with padding, has served the sequences."""
    sequences: int
    """Sequences (or samples) that do not fill a global batch."""
    tokens: int
    """Tokens that do not fill a sequence of their domain and are not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The numbers of one run."""

    name: str
    run_id: str
    steps: int
    """Number of finished steps."""
    num_steps: int
    """Configured number of steps; 0 if it is not known."""
    num_attempts: int
    tokens: int
    loss_first: float | None
    loss_last: float | None
    """Mean over the last twentieth of the run, at least 1 line and at most 50, weighted by tokens."""
    held_out_loss: float | None
    """Loss of the newest validation; None if there was none."""
    num_nonfinite: int
    """Sequences whose loss was not finite."""
    train_s: float
    """Total time of all steps, without those that were repeated."""
    warnings: tuple[str, ...]
    """Warnings about the mixture, the held-out losses and the waits for data."""
    hears_losses: bool | None
    """False if the mixture learns, but no losses were recorded in the last chunks; None if it does not learn."""
    performance: RunPerformance
    limits: tuple[StageLimit, ...]
    """Throughput that each stage could sustain alone, the lowest limit first."""
    stalls: tuple[Stall, ...]
    """Ranks that kept the others waiting, the most expensive first."""
    domains: tuple[DomainSummary, ...]
    data_end: DataEnd | None
    """None if the run has not reached the end of the data."""


def summarize_run(metrics: RunMetrics) -> RunSummary:
    """Compute all numbers of one run."""
    steps = metrics.steps
    performance = _summarize_performance(metrics)
    limits = stage_limits(metrics)
    attempts = {*steps.attempt.tolist(), *(event.get("attempt", 1) for event in metrics.attempts)}
    return RunSummary(
        name=metrics.run.name,
        run_id=metrics.run.run_id,
        steps=int(steps.step[-1]) + 1,
        num_steps=metrics.num_steps,
        num_attempts=len(attempts),
        tokens=int(steps.tokens.sum()),
        loss_first=_first_known(steps.loss),
        loss_last=_final_mean(steps.loss, steps.domain_tokens.sum(axis=1)),
        held_out_loss=_last_value(metrics.validation.loss),
        num_nonfinite=int(steps.num_nonfinite.sum()),
        train_s=float((steps.step_s * steps.num_steps).sum()),
        warnings=(
            *learned_notices(metrics.learned, metrics.num_steps),
            *_held_out_notices(metrics),
            *wait_notices(limits, performance.data_wait_p99_share),
        ),
        hears_losses=metrics.mixture.hears_losses,
        performance=performance,
        limits=limits,
        stalls=metrics.stalls,
        domains=tuple(_summarize_domain(metrics, i) for i in range(len(metrics.domains))),
        data_end=_data_end(metrics),
    )


def _held_out_notices(metrics: RunMetrics) -> list[str]:
    """Name the domains that the newest validation has no loss of."""
    if not len(metrics.validation.step):
        return []
    known = np.isfinite(metrics.validation.domain_loss[-1])
    without = [name for name, is_known in zip(metrics.domains, known, strict=True) if not is_known]
    if not without:
        return []
    return [f"No held-out loss of {list_names(without, MAX_NAMES)}: raise query.holdout.fraction."]


def _data_end(metrics: RunMetrics) -> DataEnd | None:
    event = metrics.data_end
    # Plans are made ahead: the run may have ended before.
    if event is None or event["step"] > int(metrics.steps.step[-1]) + 1:
        return None
    return DataEnd(
        unit=str(event["unit"]),
        is_padded=event["last_batch"] == "pad",
        sequences=int(event["left_over"]),
        tokens=int(event["left_over_tokens"]),
    )


def _summarize_domain(metrics: RunMetrics, domain_id: int) -> DomainSummary:
    steps = metrics.steps
    mixture = metrics.mixture
    loss = steps.domain_loss[:, domain_id]
    tokens = steps.domain_tokens[:, domain_id]
    return DomainSummary(
        domain_id=domain_id,
        name=metrics.domains[domain_id],
        tokens=int(tokens.sum()),
        served_share=float(steps.domain_sequences[:, domain_id].sum() / max(steps.domain_sequences.sum(), 1)),
        weight_first=_first_known(mixture.weights[:1, domain_id]),
        weight_last=_last_value(mixture.weights[:, domain_id]),
        epochs=_last_value(mixture.epochs[:, domain_id]),
        loss_first=_first_known(loss),
        loss_last=_final_mean(loss, tokens),
        held_out_loss=_last_value(metrics.validation.domain_loss[:, domain_id]),
    )


def _summarize_performance(metrics: RunMetrics) -> RunPerformance:
    steps = metrics.steps
    comm = metrics.comm
    num_ranks = int(steps.num_ranks[-1])

    # Only lines with the final number of ranks are comparable.
    starts = (steps.num_ranks == num_ranks) & steps.is_attempt_start
    steady = steps.is_steady

    step_s = steps.step_s[steady]
    line_s = (steps.step_s * steps.num_steps)[steady]
    waited_s = steps.data_wait_s * steps.num_steps
    line_wait_share = steps.data_wait_s[steady] / np.maximum(step_s, MIN_SECONDS)
    return RunPerformance(
        num_ranks=num_ranks,
        num_nodes=_num_nodes(metrics, num_ranks),
        tokens_per_s=float(np.median(steps.tokens_per_s[steady])),
        step_p50_s=float(np.percentile(step_s, 50)),
        step_p95_s=float(np.percentile(step_s, 95)),
        data_wait_share=float(waited_s[steady].sum() / max(line_s.sum(), MIN_SECONDS)),
        data_wait_p99_share=float(np.percentile(line_wait_share, 99)),
        start_wait_s=float(waited_s[starts].max(initial=0.0)),
        plan_p50_s=_percentile(comm.plan, 50),
        broadcast_p50_s=_percentile(comm.broadcast, 50),
        broadcast_p95_s=_percentile(comm.broadcast, 95),
        reduce_p50_s=_percentile(comm.reduce, 50),
        reduce_p95_s=_percentile(comm.reduce, 95),
    )


def _num_nodes(metrics: RunMetrics, num_ranks: int) -> int | None:
    """Return the number of nodes of the newest attempt with `num_ranks` ranks, if it was recorded."""
    nodes = [event.get("num_nodes") for event in metrics.attempts if event.get("num_ranks") == num_ranks]
    return int(nodes[-1]) if nodes and nodes[-1] is not None else None


def _percentile(series: TimeSeries, q: float) -> float | None:
    return float(np.percentile(series.seconds, q)) if len(series.seconds) else None


def _first_known(values: Floats) -> float | None:
    """Return the first finite value."""
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) else None


def _last_value(values: Floats) -> float | None:
    """Return the last value if it is finite."""
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def _final_mean(values: Floats, tokens: NDArray[np.int64]) -> float | None:
    """Return the mean over the end of the run, weighted by tokens; the last known value if the end has none."""
    known = np.flatnonzero(np.isfinite(values) & (tokens > 0))
    if not len(known):
        return None
    window_size = min(max(len(values) // 20, 1), 50)
    window = known[known >= len(values) - window_size]
    lines = window if len(window) else known[-1:]
    return float(np.average(values[lines], weights=tokens[lines]))
