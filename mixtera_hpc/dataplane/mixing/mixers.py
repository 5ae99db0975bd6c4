"""Mixers: the objects on rank 0 that decide the weights of each chunk.

The statistics of chunk c decide the weights of chunk c + `feedback_lag`, no matter how early or late they arrive, so a
run is reproducible. Mixers nest: a schedule holds one mixer per stage, and bounds wrap any mixer. The mixing algorithm
runs in a separate thread, so a refit delays no step. `dataplane.mixing.from_config` builds mixers from a
configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm
from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.core.mixing.schedules import ScheduleShape, blend_at
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = [
    "BoundedMixer",
    "DynamicMixer",
    "FixedMixer",
    "Mixer",
    "MixerStage",
    "ScheduledMixer",
    "strip_prefix",
]

Weights = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


class Mixer(Protocol):
    """Decides the weights of chunks, which are requested in ascending order; used on rank 0 only."""

    def weights_of(self, chunk: int) -> Weights | None:
        """Return the weights of `chunk`, shape (K,), sum 1; None while statistics it needs are being processed."""

    def feed(self, statistics: DomainStatistics) -> None:
        """Take the statistics of one step, in order of steps; return at once."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state after every step fed so far, for a checkpoint."""

    def load(self, arrays: Arrays) -> None:
        """Restore the state that `arrays` returned."""

    def close(self) -> None:
        """Stop background threads."""


class FixedMixer:
    """Returns the same weights for every chunk."""

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
    """Returns the weights of a mixing algorithm that is fed the statistics of every step, in order."""

    def __init__(self, algorithm: MixingAlgorithm[Any], prior: Weights, chunk_steps: int, feedback_lag: int) -> None:
        """Start with the weights `prior`, which hold for the first `feedback_lag` chunks."""
        self._algorithm = algorithm
        self._chunk_steps = chunk_steps
        self._lag = feedback_lag
        self._state = algorithm.start(prior)
        # Chunk → weights, from the last finished chunk on.
        self._decided: dict[int, Weights] = dict.fromkeys(range(feedback_lag), prior)
        self._newest = prior
        # One thread, so that updates run in the order in which they were fed.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixing")
        self._pending: list[Future[None]] = []

    def weights_of(self, chunk: int) -> Weights | None:
        self._collect(wait=False)
        return self._decided.get(chunk)

    def feed(self, statistics: DomainStatistics) -> None:
        self._pending.append(self._thread.submit(self._update, statistics))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state (see `Mixer`) after waiting for the thread."""
        self._collect(wait=True)
        chunks = sorted(self._decided)
        return {
            "mixer/chunks": np.array(chunks, np.int64),
            "mixer/newest": self._newest,
            "mixer/weights": np.stack([self._decided[chunk] for chunk in chunks]),
            **{f"algorithm/{k}": v for k, v in self._algorithm.state_arrays(self._state).items()},
        }

    def load(self, arrays: Arrays) -> None:
        chunks = arrays["mixer/chunks"].tolist()
        self._decided = dict(zip(chunks, np.array(arrays["mixer/weights"]), strict=True))
        self._newest = np.array(arrays["mixer/newest"])
        self._state = self._algorithm.state_from_arrays(strip_prefix("algorithm/", arrays))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _update(self, statistics: DomainStatistics) -> None:
        """Update the algorithm with one step; runs in the thread."""
        weights = self._newest
        # Skipped steps arrive with zero sequences: they end chunks, but the algorithm does not see them.
        if statistics.num_sequences.any():
            self._state, weights = self._algorithm.update(self._state, statistics)
        self._newest = weights

        # The last step of a chunk decides the weights `feedback_lag` chunks later.
        chunk, step_in_chunk = divmod(statistics.step, self._chunk_steps)
        if step_in_chunk == self._chunk_steps - 1:
            self._decided[chunk + self._lag] = weights
            self._decided.pop(chunk - 1, None)

    def _collect(self, wait: bool) -> None:
        """Re-raise exceptions of the thread in the caller; with `wait`, wait for all updates."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.pop(0).result()


class BoundedMixer:
    """Moves the weights of another mixer between floors and caps: to the nearest mixture in relative entropy."""

    def __init__(self, inner: Mixer, floor: Weights, cap: Weights) -> None:
        """Wrap `inner`.

        Args:
            floor: shape (K,), sum at most 1.
            cap: shape (K,), sum at least 1.
        """
        self._inner = inner
        self._floor = floor
        self._cap = cap

    def weights_of(self, chunk: int) -> Weights | None:
        requested = self._inner.weights_of(chunk)
        return None if requested is None else project_to_bounds(requested, self._floor, self._cap)

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
    """One stage of a schedule."""

    start: float
    """In the unit of the schedule: steps or tokens."""
    mixer: Mixer


class ScheduledMixer:
    """Mixers that follow each other. Each of them sees the statistics of every step, also before its stage begins."""

    def __init__(self, stages: Sequence[MixerStage], shape: ScheduleShape, position_of: Callable[[int], float]) -> None:
        """Build a schedule.

        Args:
            stages: in ascending order of start; the first holds from the beginning of the run.
            shape: the transition from one stage to the next.
            position_of: chunk → position of its first step, in the unit of the starts.
        """
        self._stages = tuple(stages)
        self._starts = [stage.start for stage in stages]
        self._shape = shape
        self._position_of = position_of

    def weights_of(self, chunk: int) -> Weights | None:
        # A dynamic stage may not have decided yet; ask it only if its share is not 0.
        blend = blend_at(self._starts, self._shape, self._position_of(chunk))
        share = blend.share_of_next
        weights = self._stages[blend.stage].mixer.weights_of(chunk)
        if weights is None or share == 0.0:
            return weights
        following = self._stages[blend.stage + 1].mixer.weights_of(chunk)
        return None if following is None else (1 - share) * weights + share * following

    def feed(self, statistics: DomainStatistics) -> None:
        for stage in self._stages:
            stage.mixer.feed(statistics)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"stage{i}/{k}": v for i, stage in enumerate(self._stages) for k, v in stage.mixer.arrays().items()}

    def load(self, arrays: Arrays) -> None:
        for i, stage in enumerate(self._stages):
            stage.mixer.load(strip_prefix(f"stage{i}/", arrays))

    def close(self) -> None:
        for stage in self._stages:
            stage.mixer.close()


def strip_prefix(prefix: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the arrays whose names begin with `prefix`, under names without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
