"""Look up the steps of several chunks together, before the plans of the later ones have arrived.

While the weights stay the same, a plan follows from the one before it. The look-up of an expected plan is used only if
the plan that arrives is equal, so the batches do not depend on it. Price: a look-up is about 200 numpy calls, which
take as long for eight chunks of few sequences as for one.

A look-up of stored tokens includes their places in the files. If a look-up of several chunks fails, the first of them
is looked up alone, so that an error is raised at its own step. Text is not looked up ahead, because it is tokenized
when it is read.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.packing.sequences_of_steps import PlannedSteps, SequencesOfSteps
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import StepContent, is_last_chunk, training_steps_of
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences

__all__ = ["StepLookup", "StepsAhead", "documents_of_steps"]

MAX_CHUNKS = 8
"""Chunks that are looked up together, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLookup:
    """The look-up of steps of one plan: their sequences and documents."""

    planned: PlannedSteps
    contents: list[StepContent]
    documents: Documents
    sequences: StoredSequences | None
    """The sequences of all steps that were looked up together, if tokens are stored; None for samples."""
    first: int
    """Number of the first step among the batches of `sequences`."""


class StepsAhead:
    """Looks up the steps of the next chunks. Not thread-safe."""

    def __init__(
        self, source: Source, contents: SequencesOfSteps, documents: SequenceDocuments, reader: DocumentReader
    ) -> None:
        """Look nothing up yet; the arguments are those of the same reading thread."""
        self._source = source
        self._contents = contents
        self._documents = documents
        self._reader = reader
        self._can_look_ahead = not source.layout.in_tokens or reader.holds_all_tokens
        self._lookups: deque[StepLookup] = deque()
        """The steps of the chunks that are expected next, in order."""
        self._newest: ChunkPlan | None = None
        """The plan that was served last."""
        self._num_chunks = 1
        """Chunks that were looked up together the last time."""

    def take(self, planned: PlannedSteps, max_steps: int) -> StepLookup | None:
        """Return the look-up of steps: from an earlier call, or made now together with those of the next chunks.

        Args:
            planned: the steps that are served now.
            max_steps: steps that may be looked up together.

        Returns:
            None if the caller has to look up these steps alone.
        """
        newest = self._newest
        self._newest = planned.plan
        if self._lookups:
            lookup = self._lookups.popleft()
            if lookup.planned.steps == planned.steps and lookup.planned.plan.is_equal(planned.plan):
                return lookup
            self._lookups.clear()
        if not self._can_look_ahead or planned.steps != training_steps_of(self._source, planned.plan, 0):
            # Another process serves some steps of the chunk, or the run continues inside of it.
            return None
        is_steady = newest is not None and _is_next(planned.plan, newest)
        self._num_chunks = min(2 * self._num_chunks, MAX_CHUNKS) if is_steady else 1
        num_chunks = min(self._num_chunks, max_steps // len(planned.steps))
        if num_chunks < 2:
            return None
        try:
            self._look_up(self._expected(planned, num_chunks))
        except Exception:
            # Any error is raised again when its own chunk is looked up.
            self.forget()
            return None
        return self._lookups.popleft()

    def forget(self) -> None:
        """Drop all look-ups of later chunks."""
        self._lookups.clear()
        self._num_chunks = 1

    def _expected(self, planned: PlannedSteps, count: int) -> list[PlannedSteps]:
        """Return up to `count` chunks: the steps of `planned`, and those of the plans that are expected after it."""
        chunks = [planned]
        while len(chunks) < count and not is_last_chunk(self._source, chunks[-1].plan):
            plan = _expected_after(self._source.planner, chunks[-1].plan)
            if plan is None:
                break
            chunks.append(PlannedSteps(plan, training_steps_of(self._source, plan, 0)))
        return chunks

    def _look_up(self, chunks: Sequence[PlannedSteps]) -> None:
        contents = self._contents.of(chunks)
        documents = documents_of_steps(self._documents, contents)
        borders = list(accumulate((len(steps) for _, steps in chunks), initial=0))
        sequences = None
        if self._source.layout.in_tokens:
            sequences = self._reader.sequences_ahead(documents, contents, borders[1])
        own_documents = documents
        first_document = 0
        for planned, (begin, end) in zip(chunks, pairwise(borders), strict=True):
            own = contents[begin:end]
            if sequences is None:
                count = sum(content.num_sequences for content in own)
                own_documents = documents.select(slice(first_document, first_document + count))
                first_document += count
            self._lookups.append(
                StepLookup(planned=planned, contents=own, documents=own_documents, sequences=sequences, first=begin)
            )


def documents_of_steps(documents: SequenceDocuments, contents: Sequence[StepContent]) -> Documents:
    """Return the documents of the sequences of some steps, one step after the other."""
    domain = np.concatenate([content.domain_ids[: content.num_sequences] for content in contents])
    sequence = np.concatenate([content.sequence[: content.num_sequences] for content in contents])
    return documents.documents(domain, sequence)


def _is_next(plan: ChunkPlan, before: ChunkPlan) -> bool:
    """Return True if `plan` is the one after `before` and has the same weights."""
    return plan.chunk == before.chunk + 1 and np.array_equal(plan.weights, before.weights)


def _expected_after(planner: Planner, plan: ChunkPlan) -> ChunkPlan | None:
    """Return the plan that follows another one if the weights stay the same; None if a domain may end in it."""
    state = planner.after(plan)
    num_slots = planner.batch_schedule.slots(state.step, state.step + planner.chunk_steps)
    is_served = plan.weights > 0
    if (planner.capacity - state.cursors)[is_served].min() <= num_slots + 1:
        return None
    return ChunkPlan(
        chunk=state.chunk,
        first_step=state.step,
        num_steps=planner.chunk_steps,
        last=False,
        cursors=state.cursors,
        lags=state.lags,
        weights=plan.weights,
    )
