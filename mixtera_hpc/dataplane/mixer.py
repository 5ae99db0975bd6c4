"""Rank 0's side of the feedback: which weights each chunk gets.

Statistics of chunk c decide the weights of chunk c + `feedback_lag`, always, whether they arrive early or late; so a run is
reproducible. The mixing algorithm runs in a thread of its own: a refit delays no step.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["DynamicMixer", "FixedMixer", "Mixer"]

Weights = NDArray[np.float64]


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

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        return None

    def close(self) -> None:
        return None


class DynamicMixer:
    """Weights from a mixing algorithm fed with the statistics of every step, in order."""

    def __init__(self, algorithm: MixingAlgorithm, prior: Weights, chunk_steps: int, feedback_lag: int) -> None:
        self._algorithm = algorithm
        self._prior = prior
        self._chunk_steps = chunk_steps
        self._lag = feedback_lag
        self._state = algorithm.start(prior)
        self._known: dict[int, Weights] = dict.fromkeys(range(feedback_lag), prior)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixing")
        self._pending: list[Future[None]] = []

    def weights_of(self, chunk: int) -> Weights | None:
        """The weights of `chunk`, None while its statistics are missing or being worked on."""
        self._collect(wait=False)
        return self._known.get(chunk)

    def feed(self, statistics: DomainStatistics) -> None:
        """Hand over one step; returns at once."""
        self._pending.append(self._thread.submit(self._update, statistics))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state after every step fed so far, for a checkpoint; waits for the thread."""
        self._collect(wait=True)
        known = sorted(self._known)
        return {
            "mixer/chunks": np.array(known, np.int64),
            "mixer/weights": np.stack([self._known[c] for c in known]),
            **{f"algorithm/{k}": v for k, v in self._algorithm.state_arrays(self._state).items()},
        }

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` gave."""
        chunks = arrays["mixer/chunks"].tolist()
        self._known = dict(zip(chunks, np.array(arrays["mixer/weights"]), strict=True))
        prefix = "algorithm/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        self._state = self._algorithm.state_from_arrays(own)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _update(self, statistics: DomainStatistics) -> None:
        self._state, weights = self._algorithm.update(self._state, statistics)
        chunk, step_in_chunk = divmod(statistics.step, self._chunk_steps)
        if step_in_chunk == self._chunk_steps - 1:
            self._known[chunk + self._lag] = weights
            self._known.pop(chunk - 1, None)

    def _collect(self, wait: bool) -> None:
        """Let an exception of the thread come out here."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.pop(0).result()


Mixer = FixedMixer | DynamicMixer
