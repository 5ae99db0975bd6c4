"""The mixer that learns: runs a mixing algorithm in a thread, and keeps serving the old weights if the algorithm fails.

Domains of weight 0 in the initial mixture are not part of the algorithm: they stay at 0, and its floors and exploration
apply to the others. Held-out losses of step s are learned from after those of step s - 1 and before those of step s, no
matter when they arrive, so a run is reproducible.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm, learns_from
from mixtera_hpc.core.mixing.mixed_domains import STATISTICS_ARRAYS, MixedDomains
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, MixtureError

__all__ = ["DynamicMixer", "MixingProblem", "ReadLosses", "strip_prefix"]

logger = logging.getLogger("mixtera_hpc")

Weights = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]

NOT_DESCRIBED = ("weight", "num_sequences")
"""Entries of `describe` that the events of a chunk hold anyway."""

SIGNIFICANT_DIGITS = 6
"""Digits of the numbers that describe an algorithm in the metrics."""

SUM_TOLERANCE = 1e-6
"""Weights of an algorithm may sum to 1 within this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingProblem:
    """Updates of a mixing algorithm that failed; the weights before them stay in force."""

    step: int
    """Step of the newest one, counted from the first chunk of the mixture."""
    count: int
    message: str
    """Type and message of the newest exception."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLosses:
    """Reference losses that were read from a file or from a run, which may change while this run lasts."""

    values: Sequence[float]
    """One per mixed domain."""
    algorithm_with: Callable[[Sequence[float]], MixingAlgorithm[Any]]
    """Returns the algorithm with other reference losses."""


class DynamicMixer:
    """A mixer with the weights of a mixing algorithm, which gets the statistics of every step in order."""

    def __init__(
        self,
        algorithm: MixingAlgorithm[Any],
        prior: Weights,
        chunk_steps: int,
        feedback_lag: int,
        read_losses: ReadLosses | None = None,
        graph_digest: int | None = None,
    ) -> None:
        """Start with the weights `prior`, which hold for the first `feedback_lag` chunks.

        Args:
            algorithm: decides the weights of later chunks.
            prior: shape (K,).
            chunk_steps: steps of a chunk.
            feedback_lag: chunks between the losses and the weights that follow from them.
            read_losses: reference losses that `algorithm` did not get from the configuration. They are part of the
                state, so that all attempts of a run use the same.
            graph_digest: of a graph that was read from a file, which must be the same in all attempts of a run.
        """
        self._algorithm = algorithm
        self._read_losses = read_losses
        self._graph_digest = graph_digest
        self._learns_from_held_out = learns_from(algorithm) == "heldout"
        self._chunk_steps = chunk_steps
        self._lag = feedback_lag
        self._size = len(prior)
        self._domains = MixedDomains.of(prior)
        mixed = prior[self._domains.ids]
        self._state = algorithm.start(mixed / mixed.sum())
        self._decided: dict[int, Weights] = dict.fromkeys(range(feedback_lag), prior)
        """Chunk → weights, from the last finished chunk on."""
        self._described: dict[int, dict[str, NDArray[Any]]] = {}
        """Chunk → what the algorithm had learned when it decided the weights."""
        self._newest = prior
        self._held_out: list[DomainStatistics] = []
        """Held-out losses that have not been learned from."""
        self._in_force = np.zeros(self._size)
        """Sum of the mixtures that were in force since the last held-out losses."""
        self._num_in_force = 0
        self._problem: MixingProblem | None = None
        # One thread, so that updates run in the order in which they were fed.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixing")
        self._pending: list[Future[None]] = []

    learns = True

    @property
    def problem(self) -> MixingProblem | None:
        """The updates that failed; None if there are none."""
        return self._problem

    def weights_of(self, chunk: int) -> Weights | None:
        """Return the weights of `chunk`; see `Mixer`."""
        self._collect(wait=False)
        return self._decided.get(chunk)

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        """Return what the algorithm had learned when it decided the weights of `chunk`; shape (K,) each."""
        return self._described.get(chunk, {})

    def feed(self, statistics: DomainStatistics) -> None:
        """Take the statistics of one step; see `Mixer`."""
        self._pending.append(self._thread.submit(self._process, statistics))

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Take the held-out losses after `statistics.step` steps; see `Mixer`."""
        if self._learns_from_held_out:
            self._pending.append(self._thread.submit(self._add_held_out, statistics))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state (see `Mixer`) after waiting for the thread."""
        self._collect(wait=True)
        chunks = sorted(self._decided)
        return {
            "mixer/chunks": np.array(chunks, np.int64),
            "mixer/newest": self._newest,
            "mixer/weights": np.stack([self._decided[chunk] for chunk in chunks]),
            **self._reference_arrays(),
            **self._held_out_arrays(),
            **{f"algorithm/{k}": v for k, v in self._algorithm.state_arrays(self._state).items()},
        }

    def load(self, arrays: Arrays) -> None:
        """Restore the state that `arrays` returned."""
        chunks = arrays["mixer/chunks"].tolist()
        self._decided = dict(zip(chunks, np.array(arrays["mixer/weights"]), strict=True))
        self._newest = np.array(arrays["mixer/newest"])
        self._restore_reference(arrays)
        self._state = self._algorithm.state_from_arrays(strip_prefix("algorithm/", arrays))
        if self._learns_from_held_out:
            self._in_force = np.array(arrays["mixer/in_force"])
            self._num_in_force = int(arrays["mixer/num_in_force"])
            columns = [arrays[f"mixer/held_out_{name}"] for name in STATISTICS_ARRAYS]
            self._held_out = [
                DomainStatistics(step=int(step), **dict(zip(STATISTICS_ARRAYS, rows, strict=True)))
                for step, *rows in zip(arrays["mixer/held_out_steps"], *columns, strict=True)
            ]

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _reference_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        if self._read_losses is not None:
            arrays["mixer/reference_losses"] = np.array(self._read_losses.values, np.float64)
        if self._graph_digest is not None:
            arrays["mixer/graph_digest"] = np.array(self._graph_digest)
        return arrays

    def _restore_reference(self, arrays: Arrays) -> None:
        """Continue with the reference losses that the run began with, if the file or the run has others now.

        Raises:
            ConfigError: the graph is another one.
        """
        digest = arrays.get("mixer/graph_digest")
        if digest is not None and self._graph_digest is not None and int(digest) != self._graph_digest:
            raise ConfigError(
                "The file that mixture.algorithm.graph names has changed since the run began, and a checkpoint does "
                "not hold it.\n  Restore the file. To use another graph from now on, give it another name and request "
                "it with mixtera-hpc mixture set."
            )
        saved = arrays.get("mixer/reference_losses")
        if saved is None or self._read_losses is None:
            return
        if np.array_equal(saved, np.array(self._read_losses.values, np.float64)):
            return
        logger.warning(
            "The file or run that mixture.algorithm takes its reference losses from has changed. The run goes on with "
            "those that it began with: %s.",
            ", ".join(f"{loss:.6g}" for loss in saved.tolist()),
        )
        self._read_losses = replace(self._read_losses, values=saved.tolist())
        self._algorithm = self._read_losses.algorithm_with(saved.tolist())

    def _held_out_arrays(self) -> dict[str, NDArray[Any]]:
        """Return what only algorithms that learn from held-out losses need."""
        if not self._learns_from_held_out:
            return {}
        shape = (len(self._held_out), self._size)
        columns = {name: [getattr(s, name) for s in self._held_out] for name in STATISTICS_ARRAYS}
        return {
            "mixer/in_force": self._in_force,
            "mixer/num_in_force": np.array(self._num_in_force),
            "mixer/held_out_steps": np.array([s.step for s in self._held_out], np.int64),
            **{f"mixer/held_out_{n}": np.array(v, STATISTICS_ARRAYS[n]).reshape(shape) for n, v in columns.items()},
        }

    def _process(self, statistics: DomainStatistics) -> None:
        """Learn from one step; runs in the thread."""
        if self._learns_from_held_out:
            self._learn_from_held_out(statistics)
        elif statistics.num_sequences.any():
            # Skipped steps arrive with zero sequences: they end chunks, but the algorithm does not see them.
            self._learn(statistics)

        # The last step of a chunk decides the weights `feedback_lag` chunks later.
        chunk, step_in_chunk = divmod(statistics.step, self._chunk_steps)
        if step_in_chunk == self._chunk_steps - 1:
            self._decided[chunk + self._lag] = self._newest
            self._decided.pop(chunk - 1, None)
            self._described[chunk + self._lag] = self._describe()
            self._described.pop(chunk - 1, None)

    def _add_held_out(self, statistics: DomainStatistics) -> None:
        self._held_out.append(statistics)

    def _learn_from_held_out(self, statistics: DomainStatistics) -> None:
        """Learn from the held-out losses before a training step, and remember the mixture of the step."""
        due = [held_out for held_out in self._held_out if held_out.step <= statistics.step]
        self._held_out = [held_out for held_out in self._held_out if held_out.step > statistics.step]
        for held_out in due:
            mean = self._in_force / self._num_in_force if self._num_in_force else None
            self._in_force = np.zeros(self._size)
            self._num_in_force = 0
            self._learn(replace(held_out, weights=mean))
        if statistics.weights is not None and statistics.num_sequences.any():
            self._in_force = self._in_force + statistics.weights
            self._num_in_force += 1

    def _learn(self, statistics: DomainStatistics) -> None:
        """Update the algorithm; if it fails, keep its state and the weights."""
        # The algorithm may be the user's and may raise anything. Training must go on.
        try:
            state, weights = self._algorithm.update(self._state, self._domains.restrict(statistics))
            checked = _checked(weights, len(self._domains.ids))
        except USER_CODE_ERRORS as error:
            count = self._problem.count + 1 if self._problem else 1
            message = f"{type(error).__name__}: {error}"
            self._problem = MixingProblem(step=statistics.step, count=count, message=message)
            return
        self._state = state
        self._newest = self._domains.scatter(checked, 0.0)

    def _describe(self) -> dict[str, NDArray[Any]]:
        try:
            described = self._algorithm.describe(self._state)
            return {
                name: self._domains.scatter(_rounded(np.asarray(values, np.float64)), np.nan)
                for name, values in described.items()
                if name not in NOT_DESCRIBED
            }
        except USER_CODE_ERRORS:  # A report that an algorithm of the user's cannot make must not stop the training.
            return {}

    def _collect(self, wait: bool) -> None:
        """Re-raise exceptions of the thread in the caller; with `wait`, wait for all updates."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.pop(0).result()


def strip_prefix(prefix: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the arrays whose names begin with `prefix`, under names without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _checked(weights: Any, num_domains: int) -> Weights:
    """Return the weights of an algorithm.

    Raises:
        MixtureError: they are not a distribution over the domains.
    """
    checked: Weights = np.asarray(weights, np.float64)
    is_valid = checked.shape == (num_domains,) and np.isfinite(checked).all() and (checked >= 0).all()
    if not is_valid or abs(checked.sum() - 1) > SUM_TOLERANCE:
        raise MixtureError(
            f"The algorithm returned weights of shape {checked.shape} that span {checked.min(initial=np.inf):.6g} to "
            f"{checked.max(initial=-np.inf):.6g} and sum to {checked.sum():.6g}, expected {num_domains} finite weights "
            "of at least 0 and sum 1."
        )
    return checked


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values with `SIGNIFICANT_DIGITS`; long numbers would make the metrics large."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponent = np.floor(np.log10(np.abs(values)))
        scale = 10.0 ** (SIGNIFICANT_DIGITS - 1 - exponent)
        rounded = np.rint(values * scale) / scale
    return np.where(np.isfinite(rounded), rounded, values)
