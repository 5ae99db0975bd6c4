"""The sequence of mixtures that a run is served from: the configured one, then the requested ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.context import MixtureContext
from mixtera_hpc.dataplane.mixing.dynamic_mixer import MixingProblem, strip_prefix
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.mixers import Mixer
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision, parse_request
from mixtera_hpc.errors import ConfigError, MixteraError

__all__ = ["MixtureSequence"]


class MixtureSequence:
    """Mixers that follow each other, each from a named chunk on.

    Each mixer sees only the statistics of its own chunks, and counts chunks and steps from its own first chunk.
    """

    def __init__(self, mixture: MixtureConfig, context: MixtureContext, *, learn: bool = True) -> None:
        """Begin with `mixture` at chunk 0; with `learn` False, on a rank that decides nothing, nothing is learned."""
        self._context = context
        self._learn = learn
        self._mixers: dict[int, Mixer] = {0: make_mixer(mixture, context, learn=learn)}
        """First chunk → mixer."""
        self.learns = self._mixers[0].learns
        """True if any mixer uses the statistics of steps."""
        self._decisions: dict[int, MixtureDecision] = {}

    @property
    def decisions(self) -> list[MixtureDecision]:
        """The accepted decisions, in order of chunks."""
        return [self._decisions[chunk] for chunk in sorted(self._decisions)]

    def restore(self, decisions: Sequence[MixtureDecision]) -> None:
        """Install recorded decisions. If several name the same chunk, the last one wins.

        A mixer whose decision is installed already stays as it is; a new decision begins with a new mixer.
        """
        # Decisions are in the order in which they were made, so the last one for a chunk stays in the dictionary.
        latest = {decision.chunk: decision for decision in decisions if decision.refused is None}
        for decision in latest.values():
            if self._decisions.get(decision.chunk) != decision:
                self._install(decision)

    def decide_request(self, text: str, first: int) -> MixtureDecision:
        """Decide on a request, and install its mixture unless it is refused.

        Args:
            text: what `write_request` wrote.
            first: the first chunk that is not planned yet.
        """
        try:
            request = parse_request(text)
        except ConfigError as error:
            return MixtureDecision(chunk=first, mixture=MixtureConfig(), refused=str(error))
        chunk = first if request.chunk is None else request.chunk
        decision = MixtureDecision(chunk=chunk, mixture=request.mixture)
        if chunk < first:
            reason = f"chunk {chunk} is planned already; the first chunk that can still change is {first}"
            return replace(decision, refused=reason)
        # A mixture that this run cannot serve is refused here, not in the chunk where it would begin.
        try:
            self._install(decision)
        except MixteraError as error:
            return replace(decision, refused=str(error))
        return decision

    def weights_of(self, chunk: int) -> NDArray[np.float64] | None:
        """Return the weights of `chunk`, shape (K,), sum 1; None while statistics it needs are being processed."""
        begin = self._begin_of(chunk)
        return self._mixers[begin].weights_of(chunk - begin)

    def feed(self, statistics: DomainStatistics) -> None:
        """Pass the statistics of one data step to the mixer that its chunk was served from."""
        chunk_steps = self._context.timeline.chunk_steps
        begin = self._begin_of(statistics.step // chunk_steps)
        self._mixers[begin].feed(replace(statistics, step=statistics.step - begin * chunk_steps))

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Pass held-out losses before data step `statistics.step` to the mixer that its chunk was served from."""
        chunk_steps = self._context.timeline.chunk_steps
        begin = self._begin_of(statistics.step // chunk_steps)
        self._mixers[begin].feed_held_out(replace(statistics, step=statistics.step - begin * chunk_steps))

    def description_of(self, chunk: int) -> dict[str, NDArray[Any]]:
        """Return what an algorithm had learned when it decided the weights of `chunk`; empty if none did."""
        begin = self._begin_of(chunk)
        return self._mixers[begin].description_of(chunk - begin)

    @property
    def problem(self) -> MixingProblem | None:
        """Updates of the newest mixture that failed, with steps of the run; None if there are none."""
        begin = max(self._mixers)
        problem = self._mixers[begin].problem
        if problem is None:
            return None
        return replace(problem, step=problem.step + begin * self._context.timeline.chunk_steps)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state of all mixers, for a checkpoint."""
        return {f"from{begin}/{k}": v for begin, mixer in self._mixers.items() for k, v in mixer.arrays().items()}

    def load(self, decisions: Sequence[MixtureDecision], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the state that `decisions` and `arrays` returned."""
        self.restore(decisions)
        for begin, mixer in self._mixers.items():
            # A mixer that was installed after the state was saved has nothing to restore.
            if own := strip_prefix(f"from{begin}/", arrays):
                mixer.load(own)

    def close(self) -> None:
        """Stop the threads of all mixers."""
        for mixer in self._mixers.values():
            mixer.close()

    def _begin_of(self, chunk: int) -> int:
        """Return the first chunk of the mixer that `chunk` is served from."""
        return max(begin for begin in self._mixers if begin <= chunk)

    def _install(self, decision: MixtureDecision) -> None:
        """Build the mixer of a decision and let it hold from its chunk on."""
        # Schedules of the new mixture count steps and tokens of the whole run, so the timeline is shifted with it.
        timeline = self._context.timeline
        first = decision.chunk
        shifted = replace(timeline, step=timeline.step_of(first), items=timeline.items_before(first))
        mixer = make_mixer(decision.mixture, replace(self._context, timeline=shifted), learn=self._learn)
        if first in self._mixers:
            self._mixers[first].close()
        self._mixers[first] = mixer
        self.learns = any(installed.learns for installed in self._mixers.values())
        self._decisions[first] = decision
