"""The recorded metrics of a run as numpy arrays.

Shapes: S lines of `steps.jsonl`, C chunks, V validations, K domains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import load_yaml
from mixtera_hpc.core.statistics import STAGES
from mixtera_hpc.errors import DataError, LaunchError
from mixtera_hpc.report.mixing.learned_mixture import LearnedMixture, read_learned
from mixtera_hpc.report.safe_text import escape_controls
from mixtera_hpc.report.timing.stalls import Stall, find_stalls
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
    """Mean wait per step for data: that of rank 0, or of the rank whose own reading was slowest, if that is longer."""
    num_nonfinite: Ints
    domain_loss: Floats
    """Shape (S, K)."""
    domain_tokens: Ints
    """Shape (S, K)."""
    domain_sequences: Ints
    """Shape (S, K)."""
    stage_s: Mapping[str, Floats]
    """Stage → seconds per step of the slowest rank; 0 in lines without the stage."""

    @property
    def is_steady(self) -> NDArray[np.bool_]:
        """True for lines with the final number of ranks that are not the first of an attempt; shape (S,).

        If there are none, all lines with the final number of ranks.
        """
        same_ranks: NDArray[np.bool_] = self.num_ranks == self.num_ranks[-1]
        steady = same_ranks & ~self.is_attempt_start
        return steady if steady.any() else same_ranks

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
    hears_losses: bool | None
    """True if the newest chunk had recent losses to learn from; None for a mixture that does not learn."""


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

    def positive(self) -> Self:
        """Return the series without durations of zero."""
        is_positive = self.seconds > 0
        return replace(self, step=self.step[is_positive], seconds=self.seconds[is_positive])


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
    stalls: tuple[Stall, ...]
    """Ranks that kept the others waiting, the most expensive first."""
    learned: LearnedMixture
    """The learned values of the mixing algorithm."""
    data_end: Mapping[str, Any] | None
    """The newest event of `data_end.jsonl`; None if the end of the data was not planned."""

    @property
    def num_steps(self) -> int:
        """Configured number of steps of the run; 0 if only the user's training program knows it."""
        if self.attempts and self.attempts[-1].get("num_steps") == 0:
            return 0
        return int(self.config.get("training", {}).get("num_steps", 0))

    @property
    def is_counted_in_tokens(self) -> bool:
        """True if progress is counted in tokens, because steps have different sizes: a batch ramp, or a run edit."""
        has_ramp = bool(self.config.get("dataplane", {}).get("batch_schedule"))
        sizes = {(attempt.get("seq_len"), attempt.get("global_batch_size")) for attempt in self.attempts}
        return (has_ramp or len(sizes) > 1) and bool(self.steps.tokens.any())

    def progress_before(self, steps: Ints) -> Ints:
        """Return the progress of the run before each of `steps`: their numbers, or the counted tokens before them."""
        if not self.is_counted_in_tokens:
            return steps
        ends = np.append(0, self.steps.step + 1)
        tokens = np.append(0, np.cumsum(self.steps.tokens))
        before: Ints = np.rint(np.interp(steps, ends, tokens)).astype(np.int64)
        return before

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
    steps = _step_history(_Columns(events=events, path=path))
    num_domains = steps.domain_loss.shape[1]
    names = _domain_names(num_domains, [*attempts, *mixture])
    config = load_yaml(run.config)
    return RunMetrics(
        run=run,
        config=config,
        domains=names,
        attempts=tuple(attempts),
        started=str((attempts or events)[0].get("time", "")),
        ended=str(events[-1].get("time", "")),
        steps=steps,
        mixture=_mixture_history(_Columns(events=mixture, path=run.metric("mixture")), num_domains),
        validation=_validation_history(_read_columns(run.metric("validation")), num_domains),
        comm=_comm_timings(_read_columns(run.metric("comm"))),
        stalls=find_stalls(events, read_events(run.metric("hosts"), every_attempt=True)),
        learned=read_learned(mixture, names, config),
        data_end=next(reversed(read_events(run.metric("data_end"))), None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The fields of all events of a stream, as arrays of shape (number of events,) or (number of events, width)."""

    events: Events
    path: Path

    def floats(self, name: str, *, width: int | None = None) -> Floats:
        """Return a field of numbers, or of lists of `width` numbers (-1: of any equal length). NaN stands for null.

        Raises:
            DataError: an event lacks the field, or the values do not form such an array.
        """
        return self._shaped(name, self._values(name), np.float64, width)

    def ints(self, name: str, *, width: int | None = None, default: int | None = None) -> Ints:
        """Return a field of integers, or of lists of `width` integers. Events without it have the `default`.

        Raises:
            DataError: an event lacks the field and there is no default, or a value is null or not an integer.
        """
        values = self._values(name, default)
        # Without a dtype, numpy neither truncates fractions nor parses texts.
        array = self._shaped(name, values, None, width)
        if values and array.dtype.kind != "i":
            raise self._mismatch(name, "not all of its values are integers")
        return array.astype(np.int64)

    def _values(self, name: str, default: int | None = None) -> list[Any]:
        for number, event in enumerate(self.events, 1):
            if name not in event and default is None:
                raise DataError(
                    f"{self.path}: event {number} has no {name!r}.\n"
                    "  Another version of Mixtera-HPC wrote this file. Use that version for the report."
                )
        return [event.get(name, default) for event in self.events]

    def _shaped(self, name: str, values: list[Any], dtype: type | None, width: int | None) -> NDArray[Any]:
        shape = (len(values),) if width is None else (len(values), width)
        try:
            return np.array(values, dtype).reshape(shape)
        except (TypeError, ValueError) as error:
            raise self._mismatch(name, error) from None

    def _mismatch(self, name: str, reason: object) -> DataError:
        return DataError(
            f"{self.path}: {name!r} must have the same type and length on every line ({reason}).\n"
            "  The file is damaged. Remove the lines that differ."
        )


def _read_columns(path: Path) -> _Columns:
    return _Columns(events=read_events(path), path=path)


def _step_history(columns: _Columns) -> StepHistory:
    domain_loss = columns.floats("domain_loss", width=-1)
    num_domains = domain_loss.shape[1]
    return StepHistory(
        step=columns.ints("step"),
        attempt=columns.ints("attempt", default=1),
        num_steps=columns.ints("num_steps", default=1),
        num_ranks=columns.ints("num_ranks", default=1),
        loss=columns.floats("loss"),
        tokens=columns.ints("tokens"),
        tokens_per_s=columns.floats("tokens_per_s"),
        step_s=columns.floats("step_s"),
        data_wait_s=np.maximum(columns.floats("data_wait_s"), _stage_seconds(columns.events, "wait")),
        num_nonfinite=columns.ints("num_nonfinite", default=0),
        domain_loss=domain_loss,
        domain_tokens=columns.ints("domain_tokens", width=num_domains),
        domain_sequences=columns.ints("domain_sequences", width=num_domains),
        stage_s={stage: _stage_seconds(columns.events, stage) for stage in STAGES},
    )


def _stage_seconds(events: Events, stage: str) -> Floats:
    return np.array([event.get("stage_s", {}).get(stage, 0.0) for event in events], np.float64)


def _mixture_history(columns: _Columns, num_domains: int) -> MixtureHistory:
    return MixtureHistory(
        step=columns.ints("step"),
        weights=columns.floats("weights", width=num_domains),
        epochs=columns.floats("epochs", width=num_domains),
        hears_losses=columns.events[-1].get("hears_losses") if columns.events else None,
    )


def _validation_history(columns: _Columns, num_domains: int) -> ValidationHistory:
    return ValidationHistory(
        step=columns.ints("step"),
        loss=columns.floats("loss"),
        domain_loss=columns.floats("domain_loss", width=num_domains),
        domain_tokens=columns.ints("domain_tokens", width=num_domains),
    )


def _comm_timings(columns: _Columns) -> CommTimings:
    def time_series(name: str) -> TimeSeries:
        # Events differ in their fields: some have the timings of a chunk, others those of a step.
        events = [event for event in columns.events if event.get(name) is not None]
        measured = replace(columns, events=events)
        return TimeSeries(step=measured.ints("step"), seconds=measured.floats(name))

    return CommTimings(plan=time_series("plan_s"), broadcast=time_series("broadcast_s"), reduce=time_series("reduce_s"))


def _domain_names(num_domains: int, events: Events) -> tuple[str, ...]:
    """Return the domain names of the newest event that has `num_domains` names; numbered names if there is none."""
    for event in reversed(events):
        if len(event.get("domains", ())) == num_domains:
            return tuple(escape_controls(str(name)) for name in event["domains"])
    return tuple(f"domain {i}" for i in range(num_domains))
