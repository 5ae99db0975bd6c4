"""Rank 0's side of the feedback: which weights each chunk gets.

Statistics of chunk c decide the weights of chunk c + `feedback_lag`, always, whether they arrive early or late; so a run is
reproducible. Mixers nest: a schedule holds one per stage, and bounds go around any. The mixing algorithm runs in a thread of
its own: a refit delays no step. `dataplane.mixture` makes them from a configuration.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm
from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = [
    "BoundedMixer",
    "DynamicMixer",
    "FixedMixer",
    "Mixer",
    "MixerStage",
    "ScheduleShape",
    "ScheduledMixer",
    "strip_prefix",
]

Weights = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
ScheduleShape = Literal["stepwise", "linear", "cosine"]


class Mixer(Protocol):
    """Weights of chunks, asked for in ascending order; used on rank 0."""

    def weights_of(self, chunk: int) -> Weights | None:
        """The weights of `chunk`, shape (K,), sum 1; None while statistics it depends on are missing or being worked on."""

    def feed(self, statistics: DomainStatistics) -> None:
        """Hand over one step, in order; returns at once."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state after every step fed so far, for a checkpoint."""

    def load(self, arrays: Arrays) -> None:
        """Go on from what `arrays` gave."""

    def close(self) -> None:
        """End what runs in the background."""


class FixedMixer:
    """The same weights for every chunk."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def weights_of(self, chunk: int) -> Weights | None:
        return self._weights

    def feed(self, statistics: DomainStatistics) -> None:
        return None

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {}

    def load(self, arrays: Arrays) -> None:
        return None

    def close(self) -> None:
        return None


class DynamicMixer:
    """Weights from a mixing algorithm fed with the statistics of every step, in order."""

    def __init__(self, algorithm: MixingAlgorithm[Any], prior: Weights, chunk_steps: int, feedback_lag: int) -> None:
        self._algorithm = algorithm
        self._chunk_steps = chunk_steps
        self._lag = feedback_lag
        self._state = algorithm.start(prior)
        self._known: dict[int, Weights] = dict.fromkeys(range(feedback_lag), prior)
        self._newest = prior
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixing")
        self._pending: list[Future[None]] = []

    def weights_of(self, chunk: int) -> Weights | None:
        self._collect(wait=False)
        return self._known.get(chunk)

    def feed(self, statistics: DomainStatistics) -> None:
        self._pending.append(self._thread.submit(self._update, statistics))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See `Mixer`; waits for the thread."""
        self._collect(wait=True)
        known = sorted(self._known)
        return {
            "mixer/chunks": np.array(known, np.int64),
            "mixer/newest": self._newest,
            "mixer/weights": np.stack([self._known[c] for c in known]),
            **{f"algorithm/{k}": v for k, v in self._algorithm.state_arrays(self._state).items()},
        }

    def load(self, arrays: Arrays) -> None:
        chunks = arrays["mixer/chunks"].tolist()
        self._known = dict(zip(chunks, np.array(arrays["mixer/weights"]), strict=True))
        self._newest = np.array(arrays["mixer/newest"])
        self._state = self._algorithm.state_from_arrays(strip_prefix("algorithm/", arrays))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _update(self, statistics: DomainStatistics) -> None:
        weights = self._newest
        if statistics.num_sequences.any():
            self._state, weights = self._algorithm.update(self._state, statistics)
        self._newest = weights
        chunk, step_in_chunk = divmod(statistics.step, self._chunk_steps)
        if step_in_chunk == self._chunk_steps - 1:
            self._known[chunk + self._lag] = weights
            self._known.pop(chunk - 1, None)

    def _collect(self, wait: bool) -> None:
        """Let an exception of the thread come out here."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.pop(0).result()


class BoundedMixer:
    """Keeps the weights of another mixer between floors and caps: the nearest mixture in relative entropy."""

    def __init__(self, inner: Mixer, floor: Weights, cap: Weights) -> None:
        """
        Args:
            floor: shape (K,), sum at most 1.
            cap: shape (K,), sum at least 1.
        """
        self._inner = inner
        self._floor = floor
        self._cap = cap

    def weights_of(self, chunk: int) -> Weights | None:
        wish = self._inner.weights_of(chunk)
        return None if wish is None else project_to_bounds(wish, self._floor, self._cap)

    def feed(self, statistics: DomainStatistics) -> None:
        self._inner.feed(statistics)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self._inner.arrays()

    def load(self, arrays: Arrays) -> None:
        self._inner.load(arrays)

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerStage:
    """One mixture of a schedule."""

    start: float
    mixer: Mixer


class ScheduledMixer:
    """Mixers that follow each other. All of them see every step's statistics, those whose turn is still to come too."""

    def __init__(self, stages: Sequence[MixerStage], shape: ScheduleShape, position_of: Callable[[int], float]) -> None:
        """
        Args:
            stages: by ascending start; the first counts from the run's beginning.
            shape: how one stage becomes the next.
            position_of: chunk → where its first step lies, in the unit of the starts.
        """
        self._stages = tuple(stages)
        self._shape = shape
        self._position_of = position_of

    def weights_of(self, chunk: int) -> Weights | None:
        position = self._position_of(chunk)
        now = max((i for i, s in enumerate(self._stages) if s.start <= position), default=0)
        weights = self._stages[now].mixer.weights_of(chunk)
        share = self._share_of_next(now, position)
        if weights is None or share == 0.0:
            return weights
        following = self._stages[now + 1].mixer.weights_of(chunk)
        return None if following is None else (1 - share) * weights + share * following

    def feed(self, statistics: DomainStatistics) -> None:
        for stage in self._stages:
            stage.mixer.feed(statistics)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"stage{i}/{k}": v for i, s in enumerate(self._stages) for k, v in s.mixer.arrays().items()}

    def load(self, arrays: Arrays) -> None:
        for i, stage in enumerate(self._stages):
            stage.mixer.load(strip_prefix(f"stage{i}/", arrays))

    def close(self) -> None:
        for stage in self._stages:
            stage.mixer.close()

    def _share_of_next(self, now: int, position: float) -> float:
        if self._shape == "stepwise" or now + 1 == len(self._stages):
            return 0.0
        start, end = self._stages[now].start, self._stages[now + 1].start
        gone = min(max((position - start) / (end - start), 0.0), 1.0)
        return gone if self._shape == "linear" else (1 - math.cos(math.pi * gone)) / 2


def strip_prefix(prefix: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
