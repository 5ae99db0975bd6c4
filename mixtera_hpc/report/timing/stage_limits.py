"""The throughput that each stage of a run could sustain alone, and which stage binds.

Reading, planning, the broadcast of plans and the reduction of losses run beside the trainer. A run is therefore as fast
as its slowest stage. Times are means over the steps of the slowest rank, without the first line of each attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtera_hpc.report.number_format import format_count, format_percent, format_seconds
from mixtera_hpc.report.run_metrics import Floats, RunMetrics, TimeSeries

__all__ = ["LIMIT_COLUMNS", "StageLimit", "limit_cells", "stage_limits", "wait_notices"]

READING = ("read", "decode", "tokenize", "pack")
"""Stages that a reading thread or process does one after the other."""

LIMIT_COLUMNS = ("stage", "time per step", "measured", "limit", "headroom", "")
"""Headings of a table of limits: the last column marks the stage that binds."""

MAX_WAIT_SHARE = 0.01
"""99th percentile of the waits for data, as a share of the step time, above which a report warns."""

MIN_SECONDS = 1e-9
"""Lower bound of a divisor that is a duration."""

MIN_WAIT_SHARE = 0.05
"""Shorter waits for a reduction, as a share of the trainer's time, do not limit the throughput."""

MAX_HEADROOM = 1000
"""Larger headroom is shown as `> 1,000 ×`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimit:
    """One stage of a run."""

    stage: str
    """`trainer`, `reading`, `planning`, `broadcast` or `reduction`."""
    detail: str
    """Shares of the parts of the time; may be empty."""
    seconds: float
    """Busy time per step."""
    measured: float
    """Rate of the run, in tokens per second over all ranks (samples per second with `mixture.unit=samples`)."""
    limit: float
    """Rate that this stage alone could sustain, in the same unit."""
    binds: bool
    """True for the stage with the lowest limit."""

    @property
    def headroom(self) -> float:
        """Limit divided by the measured rate."""
        return self.limit / self.measured if self.measured else float("inf")


def stage_limits(metrics: RunMetrics) -> tuple[StageLimit, ...]:
    """Return the limits of all stages that were measured, the lowest first.

    - trainer: the time of a step without waiting.
    - reading: `read`, `decode`, `tokenize` and `pack`, divided by the reading processes of a rank.
    - planning and broadcast: the time per chunk, divided by the steps of a chunk. Rank 0 tests broadcasts only when it
      asks for a batch, so the limit of the broadcast is a lower bound.
    - reduction: it overlaps with the next step. If more than 5 % of a step were waited for it, it takes a step of the
      trainer plus this wait; otherwise its time is not known, and it is left out.
    """
    stage_seconds = _seconds_of_stages(metrics)
    work = _work_per_step(metrics)
    measured = _measured_rate(metrics, work)
    slowest = max(stage_seconds, key=lambda stage: stage_seconds[stage])
    limits = (
        StageLimit(
            stage=stage,
            detail=_reading_detail(metrics) if stage == "reading" else "",
            seconds=seconds,
            measured=measured,
            limit=work / seconds,
            binds=stage == slowest,
        )
        for stage, seconds in stage_seconds.items()
    )
    return tuple(sorted(limits, key=lambda limit: -limit.seconds))


def wait_notices(limits: Sequence[StageLimit], data_wait_p99_share: float) -> list[str]:
    """Return a warning if one of a hundred steps waited long for data, with the cause and a cure; else nothing."""
    if data_wait_p99_share <= MAX_WAIT_SHARE:
        return []
    if any(limit.binds and limit.stage == "reading" for limit in limits):
        cure = "Reading is the slowest stage: raise dataplane.workers, or write a token store (mixtera-hpc tokenize)."
    else:
        cure = "Reading is fast enough on average, so single reads are slow: raise dataplane.prefetch_batches."
    return [
        f"One of 100 steps waits for data for {format_percent(data_wait_p99_share)} of its time or longer; more than "
        f"{format_percent(MAX_WAIT_SHARE)} is a loss of throughput. {cure}"
    ]


def limit_cells(limit: StageLimit, unit: str = "tokens") -> tuple[str, ...]:
    """Return the cells of a row below `LIMIT_COLUMNS`."""
    stage = f"{limit.stage} ({limit.detail})" if limit.detail else limit.stage
    headroom = f"> {MAX_HEADROOM:,} ×" if limit.headroom > MAX_HEADROOM else f"{limit.headroom:.2f} ×"
    return (
        stage,
        format_seconds(limit.seconds),
        f"{format_count(limit.measured)} {unit}/s",
        f"{format_count(limit.limit)} {unit}/s",
        headroom,
        "binds" if limit.binds else "",
    )


def _seconds_of_stages(metrics: RunMetrics) -> dict[str, float]:
    """Return stage → seconds per step, of the stages that took any time."""
    steps = metrics.steps
    steady = steps.is_steady
    weights = steps.num_steps[steady]

    def mean(values: Floats) -> float:
        return float(np.average(values[steady], weights=weights))

    reduce_wait_s = mean(steps.stage_s["reduce"])
    trainer_s = max(mean(steps.step_s) - mean(steps.data_wait_s) - reduce_wait_s, MIN_SECONDS)
    reading_s = sum(mean(steps.stage_s[stage]) for stage in READING)
    dataplane = metrics.config.get("dataplane", {})
    chunk_steps = max(int(dataplane.get("chunk_steps") or 1), 1)
    is_waited_for = reduce_wait_s > MIN_WAIT_SHARE * trainer_s
    seconds = {
        "trainer": trainer_s,
        "reading": reading_s / max(int(dataplane.get("workers") or 1), 1),
        "planning": _mean_seconds(metrics.comm.plan) / chunk_steps,
        "broadcast": _mean_seconds(metrics.comm.broadcast) / chunk_steps,
        "reduction": trainer_s + reduce_wait_s if is_waited_for else 0.0,
    }
    return {stage: value for stage, value in seconds.items() if value > 0}


def _work_per_step(metrics: RunMetrics) -> float:
    """Return the tokens of a step over all ranks; its samples if no tokens are counted."""
    steps = metrics.steps
    steady = steps.is_steady
    counted = steps.tokens[steady].sum() or steps.domain_sequences[steady].sum()
    return float(counted) / max(int(steps.num_steps[steady].sum()), 1)


def _measured_rate(metrics: RunMetrics, work: float) -> float:
    steps = metrics.steps
    steady = steps.is_steady
    mean_step_s = float(np.average(steps.step_s[steady], weights=steps.num_steps[steady]))
    return work / max(mean_step_s, MIN_SECONDS)


def _reading_detail(metrics: RunMetrics) -> str:
    """Return the shares of the stages of reading, the largest first."""
    steady = metrics.steps.is_steady
    totals = {stage: float(metrics.steps.stage_s[stage][steady].sum()) for stage in READING}
    total = max(sum(totals.values()), MIN_SECONDS)
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return ", ".join(f"{stage} {100 * seconds / total:.0f} %" for stage, seconds in ordered if seconds > 0)


def _mean_seconds(series: TimeSeries) -> float:
    return float(series.seconds.mean()) if len(series.seconds) else 0.0
