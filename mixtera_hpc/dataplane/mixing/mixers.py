"""Mixers: the objects on rank 0 that decide the weights of each chunk.

The statistics of chunk c decide the weights of chunk c + `feedback_lag`, no matter how early or late they arrive, so a
run is reproducible. Mixers nest: a schedule holds one mixer per stage, and bounds wrap any mixer. A mixer that learns
runs its algorithm in a separate thread, so a refit delays no step (`dataplane.mixing.dynamic_mixer`).
`dataplane.mixing.from_config` builds mixers from a configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.core.mixing.schedules import ScheduleShape, blend_at
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.dynamic_mixer import MixingProblem, strip_prefix

__all__ = ["BoundedMixer", "FixedMixer", "Mixer", "MixerStage", "ScheduledMixer"]

Weights = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


class Mixer(Protocol):
    """Decides the weights of chunks, which are requested in ascending order; used on rank 0 only."""

    def weights_of(self, chunk: int) -> Weights | None:
        """Return the weights of `chunk`, shape (K,), sum 1; None while statistics it needs are being processed."""

    def feed(self, statistics: DomainStatistics) -> None:
        """Take the statistics of one step, in order of steps; return at once."""

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Take held-out losses, before the statistics of the training step `statistics.step`; return at once."""

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        """Return what an algorithm had learned when it decided the weights of `chunk`; shape (K,) each."""

    @property
    def learns(self) -> bool:
        """True if `feed` or `feed_held_out` has any effect."""

    @property
    def problem(self) -> MixingProblem | None:
        """Updates of a mixing algorithm that failed; None if there are none."""

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

    problem: MixingProblem | None = None
    learns = False

    def weights_of(self, chunk: int) -> Weights | None:
        return self._weights

    def feed(self, statistics: DomainStatistics) -> None:
        return None

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        return None

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {}

    def load(self, arrays: Arrays) -> None:
        return None

    def close(self) -> None:
        return None


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

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        self._inner.feed_held_out(statistics)

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        return self._inner.description_of(chunk)

    @property
    def learns(self) -> bool:
        return self._inner.learns

    @property
    def problem(self) -> MixingProblem | None:
        return self._inner.problem

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

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        for stage in self._stages:
            stage.mixer.feed_held_out(statistics)

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        blend = blend_at(self._starts, self._shape, self._position_of(chunk))
        # While a stage changes into the next one, the description is that of the one that learns.
        stages = self._stages[blend.stage : blend.stage + (2 if blend.share_of_next else 1)]
        return next((found for stage in stages if (found := stage.mixer.description_of(chunk))), {})

    @property
    def learns(self) -> bool:
        return any(stage.mixer.learns for stage in self._stages)

    @property
    def problem(self) -> MixingProblem | None:
        return next((stage.mixer.problem for stage in self._stages if stage.mixer.problem), None)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"stage{i}/{k}": v for i, stage in enumerate(self._stages) for k, v in stage.mixer.arrays().items()}

    def load(self, arrays: Arrays) -> None:
        for i, stage in enumerate(self._stages):
            stage.mixer.load(strip_prefix(f"stage{i}/", arrays))

    def close(self) -> None:
        for stage in self._stages:
            stage.mixer.close()
