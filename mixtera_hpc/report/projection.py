"""Projection of a running run to its last step, at the rate of its last quarter."""

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
    exhausted_at_step: int | None
    """Step at which the domain reaches `mixture.max_epochs`; None if it never does or there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProjection:
    """Time, tokens and epochs of a run at its last step."""

    remaining_steps: int
    remaining_s: float
    total_tokens: int
    """Counted tokens of the whole run."""
    max_epochs: float | None
    domains: tuple[DomainProjection, ...]
    """Most repeated first; empty if the mixture was not recorded."""


def project_run(metrics: RunMetrics, summary: RunSummary) -> RunProjection:
    """Extrapolate time, tokens and epochs linearly to the last step."""
    remaining_steps = max(summary.num_steps - summary.steps, 0)
    last_step = summary.steps + remaining_steps
    max_epochs = metrics.config.get("mixture", {}).get("max_epochs")
    return RunProjection(
        remaining_steps=remaining_steps,
        remaining_s=remaining_steps * summary.performance.step_p50_s,
        total_tokens=round(summary.tokens * last_step / summary.steps),
        max_epochs=max_epochs,
        domains=_project_domains(metrics, last_step, max_epochs),
    )


def _project_domains(metrics: RunMetrics, last_step: int, max_epochs: float | None) -> tuple[DomainProjection, ...]:
    mixture = metrics.mixture
    if len(mixture.step) < 2:
        return ()

    # Epochs per step of every domain over the last quarter of the chunks.
    first = max(len(mixture.step) * 3 // 4 - 1, 0)
    num_steps = max(mixture.step[-1] - mixture.step[first], 1)
    epochs_per_step = (mixture.epochs[-1] - mixture.epochs[first]) / num_steps

    newest_step = int(mixture.step[-1])
    domains = []
    for name, series, rate in zip(metrics.domains, mixture.epochs.T, epochs_per_step.tolist(), strict=True):
        final_epochs = float(series[-1]) + rate * (last_step - newest_step)
        exhausted_at_step = None
        if max_epochs is not None and series[-1] >= max_epochs:
            exhausted_at_step = int(mixture.step[np.argmax(series >= max_epochs)])
        elif max_epochs is not None and final_epochs >= max_epochs:
            exhausted_at_step = newest_step + int(np.ceil((max_epochs - float(series[-1])) / rate))
        domains.append(DomainProjection(name=name, epochs=final_epochs, exhausted_at_step=exhausted_at_step))
    return tuple(sorted(domains, key=lambda domain: -domain.epochs))
