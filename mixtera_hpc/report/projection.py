"""Where a run is heading if it goes on as in its last quarter."""

from dataclasses import dataclass

import numpy as np

from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import RunSummary

__all__ = ["DomainProjection", "RunProjection", "project_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainProjection:
    """One domain at the end of the run."""

    name: str
    epochs: float
    """Passes over its data after the last step."""
    exhausted_at: int | None
    """Step at which `mixture.max_epochs` is reached; None when it is not reached, or there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProjection:
    """The rest of the run."""

    steps_left: int
    seconds_left: float
    tokens: int
    """Counted tokens of the whole run."""
    max_epochs: float | None
    domains: tuple[DomainProjection, ...]
    """Most repeated first; empty when the mixture was not recorded."""


def project_run(record: RunMetrics, summary: RunSummary) -> RunProjection:
    """Extrapolate speed, tokens and epochs linearly."""
    left = max(summary.num_steps - summary.steps, 0)
    limit = record.config.get("mixture", {}).get("max_epochs")
    return RunProjection(
        steps_left=left,
        seconds_left=left * summary.speed.step_p50_s,
        tokens=round(summary.tokens * (summary.steps + left) / summary.steps),
        max_epochs=limit,
        domains=_domains(record, summary.steps + left, limit),
    )


def _domains(record: RunMetrics, end: int, limit: float | None) -> tuple[DomainProjection, ...]:
    mixture = record.mixture
    if len(mixture.step) < 2:
        return ()
    since = max(len(mixture.step) * 3 // 4 - 1, 0)
    span = mixture.step[-1] - mixture.step[since]
    now, rate = mixture.epochs[-1], (mixture.epochs[-1] - mixture.epochs[since]) / max(span, 1)
    found = []
    for name, epochs, per_step in zip(record.domains, now.tolist(), rate.tolist(), strict=True):
        at_end = epochs + per_step * (end - int(mixture.step[-1]))
        exhausted = None
        if limit is not None and at_end >= limit:
            exhausted = int(mixture.step[-1] + np.ceil((limit - epochs) / per_step)) if per_step > 0 else end
        found.append(DomainProjection(name=name, epochs=at_end, exhausted_at=exhausted))
    return tuple(sorted(found, key=lambda d: -d.epochs))
