"""What a run recorded, as arrays. S lines of steps, C chunks, K domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import load_yaml
from mixtera_hpc.errors import DataError, LaunchError
from mixtera_hpc.track.event_reader import read_events

__all__ = ["CommTimings", "MixtureHistory", "RunMetrics", "StepHistory", "ValidationHistory", "load_run_metrics"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHistory:
    """`steps.jsonl`; shape (S,) unless it says otherwise. NaN where a value was null."""

    step: Ints
    attempt: Ints
    num_steps: Ints
    """Steps that a line covers."""
    num_ranks: Ints
    loss: Floats
    tokens: Ints
    tokens_per_s: Floats
    step_s: Floats
    data_wait_s: Floats
    num_nonfinite: Ints
    domain_loss: Floats
    """Shape (S, K)."""
    domain_tokens: Ints
    """Shape (S, K)."""
    domain_sequences: Ints
    """Shape (S, K)."""

    @property
    def opens_attempt(self) -> NDArray[np.bool_]:
        """Lines that an attempt began with: their timings hold its start-up."""
        return np.diff(self.attempt, prepend=-1) != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureHistory:
    """`mixture.jsonl`."""

    step: Ints
    """First step of each chunk; shape (C,)."""
    weights: Floats
    """Shape (C, K)."""
    epochs: Floats
    """Passes over each domain when the chunk begins; shape (C, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationHistory:
    """`validation.jsonl`: losses on held-out samples."""

    step: Ints
    """Steps that had been taken; shape (V,)."""
    loss: Floats
    """Of all tokens; shape (V,)."""
    domain_loss: Floats
    """Shape (V, K), NaN where a domain has nothing held out."""
    domain_tokens: Ints
    """Shape (V, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommTimings:
    """`comm.jsonl`: each duration with the step it was recorded for; both of shape (N,), N its own."""

    plan: tuple[Ints, Floats]
    broadcast: tuple[Ints, Floats]
    reduce: tuple[Ints, Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """Everything one run recorded."""

    run: RunFolder
    config: Mapping[str, Any]
    """`config.yaml`, as nested dicts."""
    domains: tuple[str, ...]
    """K names."""
    attempts: tuple[Mapping[str, Any], ...]
    """The `attempts` events of all attempts, superseded ones too."""
    started: str
    """UTC time of the first event, ISO 8601."""
    ended: str
    """UTC time of the last event."""
    steps: StepHistory
    mixture: MixtureHistory
    validation: ValidationHistory
    talk: CommTimings

    @property
    def num_steps(self) -> int:
        """Steps that the run was asked for."""
        return int(self.config.get("training", {}).get("num_steps", 0))

    @property
    def resumed_at(self) -> list[tuple[int, int]]:
        """(attempt, its first step) of every attempt but the first that steps were kept of."""
        first = np.flatnonzero(self.steps.opens_attempt)[1:]
        return [(int(self.steps.attempt[i]), int(self.steps.step[i])) for i in first]


def load_run_metrics(run: RunFolder) -> RunMetrics:
    """Read the metrics of `run`.

    Raises:
        LaunchError: the folder is no run.
        DataError: nothing was recorded yet, or a line lacks what every line has.
    """
    if not run.config.is_file():
        raise LaunchError(f"{run.path} is not a run: it has no config.yaml. See mixtera-hpc status.")
    path = run.metrics / "steps.jsonl"
    events = read_events(path)
    if not events:
        raise DataError(
            f"Run {run.run_id} has recorded no step yet: {path} is {'empty' if path.is_file() else 'missing'}.\n"
            f"  See mixtera-hpc logs {run.run_id}."
        )
    mixture = read_events(run.metrics / "mixture.jsonl")
    attempts = read_events(run.metrics / "attempts.jsonl", every_attempt=True)
    steps = _steps(events, path)
    return RunMetrics(
        run=run,
        config=load_yaml(run.config),
        domains=_names(steps.domain_loss.shape[1], [*attempts, *mixture]),
        attempts=tuple(attempts),
        started=str((attempts or events)[0].get("time", "")),
        ended=str(events[-1].get("time", "")),
        steps=steps,
        mixture=_mixture(mixture, steps.domain_loss.shape[1], run.metrics / "mixture.jsonl"),
        validation=_validation(run.metrics / "validation.jsonl", steps.domain_loss.shape[1]),
        talk=_talk(read_events(run.metrics / "comm.jsonl")),
    )


def _steps(events: Events, path: Path) -> StepHistory:
    def floats(name: str) -> Floats:
        return _column(events, name, path).astype(np.float64)

    def ints(name: str, default: int | None = None) -> Ints:
        return _column(events, name, path, default).astype(np.int64)

    return StepHistory(
        step=ints("step"),
        attempt=ints("attempt", 1),
        num_steps=ints("num_steps", 1),
        num_ranks=ints("num_ranks", 1),
        loss=floats("loss"),
        tokens=ints("tokens"),
        tokens_per_s=floats("tokens_per_s"),
        step_s=floats("step_s"),
        data_wait_s=floats("data_wait_s"),
        num_nonfinite=ints("num_nonfinite", 0),
        domain_loss=floats("domain_loss"),
        domain_tokens=ints("domain_tokens"),
        domain_sequences=ints("domain_sequences"),
    )


def _mixture(events: Events, num_domains: int, path: Path) -> MixtureHistory:
    if not events:
        nothing = np.zeros((0, num_domains))
        return MixtureHistory(step=np.zeros(0, np.int64), weights=nothing, epochs=nothing)
    return MixtureHistory(
        step=_column(events, "step", path).astype(np.int64),
        weights=_column(events, "weights", path).astype(np.float64),
        epochs=_column(events, "epochs", path).astype(np.float64),
    )


def _validation(path: Path, num_domains: int) -> ValidationHistory:
    events = read_events(path)
    if not events:
        nothing = np.zeros((0, num_domains))
        return ValidationHistory(
            step=np.zeros(0, np.int64), loss=nothing[:, 0], domain_loss=nothing, domain_tokens=nothing.astype(np.int64)
        )
    return ValidationHistory(
        step=_column(events, "step", path).astype(np.int64),
        loss=_column(events, "loss", path).astype(np.float64),
        domain_loss=_column(events, "domain_loss", path).astype(np.float64),
        domain_tokens=_column(events, "domain_tokens", path).astype(np.int64),
    )


def _talk(events: Events) -> CommTimings:
    def one(name: str) -> tuple[Ints, Floats]:
        found = [(e["step"], e[name]) for e in events if e.get(name) is not None and "step" in e]
        return np.array([s for s, _ in found], np.int64), np.array([v for _, v in found], np.float64)

    return CommTimings(plan=one("plan_s"), broadcast=one("broadcast_s"), reduce=one("reduce_s"))


def _column(events: Events, name: str, path: Path, default: int | None = None) -> NDArray[Any]:
    """One field of all events; numbers, or lists of one length."""
    missing = object()
    values = [event.get(name, default if default is not None else missing) for event in events]
    if missing in values:
        raise DataError(f"{path}: event {values.index(missing) + 1} has no {name!r}; another program wrote it.")
    try:
        return np.array(values, np.float64) if name != "step" else np.array(values, np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {name!r} is not the same kind of value on every line ({error}).") from None


def _names(num_domains: int, events: Events) -> tuple[str, ...]:
    for event in reversed(events):
        if len(event.get("domains", ())) == num_domains:
            return tuple(map(str, event["domains"]))
    return tuple(f"domain {i}" for i in range(num_domains))
