"""Rank 0's side of the mixture: statistics of steps in, weights of chunks out.

Chunk c gets its weights from the statistics of all data steps of the chunks up to c - `feedback_lag`. The mixing
algorithm must see every data step once, in order. Skipped data steps have no statistics, so it gets empty ones for
them. With the statistics of a step it gets the weights that the step was served with: after bounds and drops, and
`feedback_lag` chunks behind what it has decided since.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.mixing.dynamic_mixer import MixingProblem
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision
from mixtera_hpc.dataplane.mixing.sequence import MixtureSequence
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.recording.run_recorder import RunRecorder
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger

__all__ = ["MixtureFeed"]

logger = logging.getLogger("mixtera_hpc")

IN_FORCE = "in_force/"
"""Prefix of the array with the weights of a chunk."""


class MixtureFeed:
    """Connects the mixtures of a run with the steps it has served. Other ranks only open and close theirs."""

    def __init__(
        self,
        source: Source,
        ledger: StepLedger,
        state: PlaneState | None,
        decisions: Sequence[MixtureDecision],
        *,
        learn: bool = True,
    ) -> None:
        """Begin with the configured mixture, or with what `state` has learned.

        Args:
            source: what is served.
            ledger: which steps were served.
            state: the state that the run continues from.
            decisions: all recorded decisions of the run. Those made after `state` was saved hold too.
            learn: False on ranks that decide nothing.
        """
        self._source = source
        self._ledger = ledger
        self._chunk_steps = source.config.dataplane.chunk_steps
        self._mixtures = MixtureSequence(source.config.mixture, source.mixture_context, learn=learn)
        self._in_force: dict[int, NDArray[np.float64]] = {}
        """Chunk → its weights, from the chunk of the next statistics on; empty if the mixture does not learn."""
        if state is not None:
            self._mixtures.load(state.decisions, state.mixer)
            self._load_in_force(state.mixer)
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
        # Data steps at the end of a decisive chunk may have been skipped: the algorithm would wait for them for ever.
        feedback_lag = self._source.config.dataplane.feedback_lag
        decisive_data_steps = (chunk - feedback_lag + 1) * self._chunk_steps
        self._feed_skipped(min(decisive_data_steps, self._ledger.first_unknown_data_step))

        weights = self._mixtures.weights_of(chunk)
        if weights is None:
            return None
        weights = self._source.without_dropped_domains(weights)
        if self._mixtures.learns:
            total = weights.sum()
            self._in_force[chunk] = weights / total if total > 0 else weights
        return weights

    def feed(self, statistics: DomainStatistics) -> None:
        """Pass the statistics of one training step to the mixture that its chunk was served from."""
        # Skipped data steps before this one come first: the algorithm counts steps in order.
        self._feed_skipped(self._ledger.data_step(statistics.step))
        data_step = self._ledger.feed(statistics.step)
        # A mixture that does not learn costs almost nothing per step.
        if self._mixtures.learns:
            chunk, number = divmod(data_step, self._chunk_steps)
            if number == 0:
                self._in_force = {c: w for c, w in self._in_force.items() if c >= chunk}
            self._mixtures.feed(replace(statistics, step=data_step, weights=self._in_force.get(chunk)))

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Pass held-out losses to the mixture of the training step that comes next, `statistics.step`."""
        self._mixtures.feed_held_out(replace(statistics, step=self._ledger.data_step(statistics.step)))

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        """Return what the mixing algorithm had learned when it decided the weights of `chunk`; shape (K,) each."""
        return self._mixtures.description_of(chunk)

    @property
    def problem(self) -> MixingProblem | None:
        """Updates of the mixing algorithm that failed; None if there are none."""
        return self._mixtures.problem

    def answer_request(self, control: RunControl, recorder: RunRecorder, first_chunk: int) -> None:
        """Decide on a request for another mixture, if there is one; only rank 0 sees requests.

        Args:
            control: has the request.
            recorder: records the decision.
            first_chunk: the first chunk that is not planned yet.
        """
        request = control.take_mixture_request()
        if request is None:
            return
        decision = self._mixtures.decide_request(request, first_chunk)
        recorder.record_decision(decision)
        if decision.refused is None:
            logger.info("Another mixture was requested; it holds from chunk %d on.", decision.chunk)
        else:
            logger.warning("The request for another mixture was refused: %s", decision.refused)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what the mixing algorithms have learned, for a checkpoint."""
        learned = self._mixtures.arrays()
        # Only the chunk of the next step: later ones are planned again. Nobody divides by weights that do not learn.
        chunk = self._ledger.num_fed // self._chunk_steps
        if learned and chunk in self._in_force:
            learned[f"{IN_FORCE}{chunk}"] = self._in_force[chunk]
        return learned

    def close(self) -> None:
        """Stop the threads of the mixing algorithms."""
        self._mixtures.close()

    def _load_in_force(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the weights of the chunk in which the state was saved."""
        for name, weights in arrays.items():
            if name.startswith(IN_FORCE):
                self._in_force[int(name.removeprefix(IN_FORCE))] = np.array(weights)

    def _feed_skipped(self, data_step: int) -> None:
        # Mixing algorithms ignore steps without sequences, but count them.
        for skipped in self._ledger.feed_skipped(data_step):
            empty = np.zeros((NUM_BUFFER_ROWS, self._source.num_domains), np.int64)
            self._mixtures.feed(statistics_from_buffer(skipped, empty))
