"""The recorded metrics of a run as numpy arrays.

Shapes: S lines of `steps.jsonl`, C chunks, V validations, K domains.
"""

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

__all__ = [
    "CommTimings",
    "Floats",
    "Ints",
    "MixtureHistory",
    "RunMetrics",
    "StepHistory",
    "TimeSeries",
    "ValidationHistory",
    "load_run_metrics",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHistory:
    """The lines of `steps.jsonl`; arrays have shape (S,) unless stated otherwise. NaN stands for null."""

    step: Ints
    attempt: Ints
    num_steps: Ints
    """Number of steps that a line covers."""
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
    def is_attempt_start(self) -> NDArray[np.bool_]:
        """True for the first line of each attempt, whose timings include the start-up; shape (S,)."""
        is_start: NDArray[np.bool_] = np.diff(self.attempt, prepend=-1) != 0
        return is_start


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureHistory:
    """The chunks of `mixture.jsonl`."""

    step: Ints
    """First step of each chunk; shape (C,)."""
    weights: Floats
    """Requested domain weights; shape (C, K)."""
    epochs: Floats
    """Passes over the data of each domain when the chunk begins; shape (C, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationHistory:
    """The lines of `validation.jsonl`: losses on held-out samples."""

    step: Ints
    """Number of steps finished before the validation; shape (V,)."""
    loss: Floats
    """Mean over all tokens; shape (V,)."""
    domain_loss: Floats
    """Shape (V, K); NaN for a domain without held-out samples."""
    domain_tokens: Ints
    """Shape (V, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSeries:
    """Durations measured during a run; both arrays have shape (N,)."""

    step: Ints
    seconds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class CommTimings:
    """The durations of `comm.jsonl`, measured on rank 0."""

    plan: TimeSeries
    """Planning a chunk."""
    broadcast: TimeSeries
    """Broadcasting the plan of a chunk."""
    reduce: TimeSeries
    """Waiting for the reduction of the losses of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """Everything that one run recorded."""

    run: RunFolder
    config: Mapping[str, Any]
    """Content of `config.yaml`, as nested dicts."""
    domains: tuple[str, ...]
    """Names of the K domains."""
    attempts: tuple[Mapping[str, Any], ...]
    """The `attempts` events of all attempts, including those whose steps were repeated later."""
    started: str
    """Time of the first event in UTC, ISO 8601."""
    ended: str
    """Time of the last event in UTC, ISO 8601."""
    steps: StepHistory
    mixture: MixtureHistory
    validation: ValidationHistory
    comm: CommTimings

    @property
    def num_steps(self) -> int:
        """Configured number of steps of the run."""
        return int(self.config.get("training", {}).get("num_steps", 0))

    @property
    def resumed_attempts(self) -> list[tuple[int, int]]:
        """Number and first step of each attempt in the history except the first."""
        lines = np.flatnonzero(self.steps.is_attempt_start)[1:]
        return [(int(self.steps.attempt[i]), int(self.steps.step[i])) for i in lines]


def load_run_metrics(run: RunFolder) -> RunMetrics:
    """Read the metrics of `run`.

    Raises:
        LaunchError: the folder is not a run folder.
        DataError: no step was recorded yet, or a line lacks a required field.
    """
    if not run.config.is_file():
        raise LaunchError(
            f"{run.path} is not a run folder: it has no config.yaml.\n  Run mixtera-hpc status to list all runs."
        )
    path = run.metric("steps")
    events = read_events(path)
    if not events:
        state = "empty" if path.is_file() else "missing"
        raise DataError(
            f"Run {run.run_id} has not recorded any step yet: {path} is {state}.\n"
            f"  Run mixtera-hpc logs {run.run_id} to see what it is doing."
        )

    mixture = read_events(run.metric("mixture"))
    attempts = read_events(run.metric("attempts"), every_attempt=True)
    steps = _step_history(events, path)
    num_domains = steps.domain_loss.shape[1]
    return RunMetrics(
        run=run,
        config=load_yaml(run.config),
        domains=_domain_names(num_domains, [*attempts, *mixture]),
        attempts=tuple(attempts),
        started=str((attempts or events)[0].get("time", "")),
        ended=str(events[-1].get("time", "")),
        steps=steps,
        mixture=_mixture_history(mixture, num_domains, run.metric("mixture")),
        validation=_validation_history(run.metric("validation"), num_domains),
        comm=_comm_timings(read_events(run.metric("comm"))),
    )


def _step_history(events: Events, path: Path) -> StepHistory:
    def floats(name: str) -> Floats:
        return _column(events, name, path).astype(np.float64)

    def ints(name: str, default: int | None = None) -> Ints:
        return _column(events, name, path, default).astype(np.int64)

    return StepHistory(
        step=ints("step"),
        attempt=ints("attempt", default=1),
        num_steps=ints("num_steps", default=1),
        num_ranks=ints("num_ranks", default=1),
        loss=floats("loss"),
        tokens=ints("tokens"),
        tokens_per_s=floats("tokens_per_s"),
        step_s=floats("step_s"),
        data_wait_s=floats("data_wait_s"),
        num_nonfinite=ints("num_nonfinite", default=0),
        domain_loss=floats("domain_loss"),
        domain_tokens=ints("domain_tokens"),
        domain_sequences=ints("domain_sequences"),
    )


def _mixture_history(events: Events, num_domains: int, path: Path) -> MixtureHistory:
    if not events:
        empty = np.zeros((0, num_domains))
        return MixtureHistory(step=np.zeros(0, np.int64), weights=empty, epochs=empty)
    return MixtureHistory(
        step=_column(events, "step", path).astype(np.int64),
        weights=_column(events, "weights", path).astype(np.float64),
        epochs=_column(events, "epochs", path).astype(np.float64),
    )


def _validation_history(path: Path, num_domains: int) -> ValidationHistory:
    events = read_events(path)
    if not events:
        return ValidationHistory(
            step=np.zeros(0, np.int64),
            loss=np.zeros(0),
            domain_loss=np.zeros((0, num_domains)),
            domain_tokens=np.zeros((0, num_domains), np.int64),
        )
    return ValidationHistory(
        step=_column(events, "step", path).astype(np.int64),
        loss=_column(events, "loss", path).astype(np.float64),
        domain_loss=_column(events, "domain_loss", path).astype(np.float64),
        domain_tokens=_column(events, "domain_tokens", path).astype(np.int64),
    )


def _comm_timings(events: Events) -> CommTimings:
    def time_series(name: str) -> TimeSeries:
        # Events differ in their fields: some have the timings of a chunk, others those of a step.
        measured = [event for event in events if event.get(name) is not None and "step" in event]
        return TimeSeries(
            step=np.array([event["step"] for event in measured], np.int64),
            seconds=np.array([event[name] for event in measured], np.float64),
        )

    return CommTimings(plan=time_series("plan_s"), broadcast=time_series("broadcast_s"), reduce=time_series("reduce_s"))


def _column(events: Events, name: str, path: Path, default: int | None = None) -> NDArray[Any]:
    """Return one field of all events as an array: numbers, or lists of equal length.

    Raises:
        DataError: an event lacks the field and there is no default, or the values do not form an array.
    """
    for number, event in enumerate(events, 1):
        if name not in event and default is None:
            raise DataError(
                f"{path}: event {number} has no {name!r}.\n"
                "  Another version of Mixtera-HPC wrote this file. Use that version for the report."
            )
    values = [event.get(name, default) for event in events]
    dtype = np.int64 if name == "step" else np.float64
    try:
        return np.array(values, dtype)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}: {name!r} must have the same type and length on every line ({error}).\n"
            "  The file is damaged. Remove the lines that differ."
        ) from None


def _domain_names(num_domains: int, events: Events) -> tuple[str, ...]:
    """Return the domain names of the newest event that has `num_domains` names; numbered names if there is none."""
    for event in reversed(events):
        if len(event.get("domains", ())) == num_domains:
            return tuple(map(str, event["domains"]))
    return tuple(f"domain {i}" for i in range(num_domains))
