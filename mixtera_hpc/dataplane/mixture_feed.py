"""Rank 0's side of the mixture: statistics of steps in, weights of chunks out.

Chunk c gets its weights from the statistics of all data steps of the chunks up to c - `feedback_lag`. The mixing
algorithm must see every data step once, in order. Skipped data steps have no statistics, so it gets empty ones for
them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision
from mixtera_hpc.dataplane.mixing.sequence import MixtureSequence
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger

__all__ = ["MixtureFeed"]


class MixtureFeed:
    """Connects the mixtures of a run with the steps it has served. Other ranks only open and close theirs."""

    def __init__(
        self, source: Source, ledger: StepLedger, state: PlaneState | None, decisions: Sequence[MixtureDecision]
    ) -> None:
        """Begin with the configured mixture, or with what `state` has learned.

        Args:
            decisions: all recorded decisions of the run. Those made after `state` was saved hold too.
        """
        self._source = source
        self._ledger = ledger
        self._mixtures = MixtureSequence(source.config.mixture, source.mixture_context)
        if state is not None:
            self._mixtures.load(state.decisions, state.mixer)
        # A decision that was made after the state was saved holds again at its chunk: the run repeats what it did.
        self._mixtures.restore(decisions)

    @property
    def decisions(self) -> Sequence[MixtureDecision]:
        """The accepted decisions, in order of chunks."""
        return self._mixtures.decisions

    def weights_of(self, chunk: int) -> NDArray[np.float64] | None:
        """Return the weights of `chunk`, shape (K,); None while statistics it needs are missing or in progress.

        Domains whose samples were all dropped get weight 0.
        """
        plane = self._source.config.dataplane

        # Data steps at the end of a decisive chunk may have been skipped: the algorithm would wait for them for ever.
        decisive_data_steps = (chunk - plane.feedback_lag + 1) * plane.chunk_steps
        self._feed_skipped(min(decisive_data_steps, self._ledger.first_unknown_data_step))

        weights = self._mixtures.weights_of(chunk)
        return None if weights is None else self._source.without_dropped_domains(weights)

    def feed(self, statistics: DomainStatistics) -> None:
        """Pass the statistics of one training step to the mixture that its chunk was served from."""
        # Skipped data steps before this one come first: the algorithm counts steps in order.
        self._feed_skipped(self._ledger.data_step(statistics.step))
        data_step = self._ledger.feed(statistics.step)
        self._mixtures.feed(replace(statistics, step=data_step))

    def decide(self, request: str, first_chunk: int) -> MixtureDecision:
        """Accept or refuse a request for another mixture; `first_chunk` is the first one that is not planned yet."""
        return self._mixtures.decide_request(request, first_chunk)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what the mixing algorithms have learned, for a checkpoint."""
        return self._mixtures.arrays()

    def close(self) -> None:
        """Stop the threads of the mixing algorithms."""
        self._mixtures.close()

    def _feed_skipped(self, data_step: int) -> None:
        # Mixing algorithms ignore steps without sequences, but count them.
        for skipped in self._ledger.feed_skipped(data_step):
            empty = np.zeros((NUM_BUFFER_ROWS, self._source.num_domains), np.int64)
            self._mixtures.feed(statistics_from_buffer(skipped, empty))
