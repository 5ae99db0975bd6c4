"""Look up the steps of several chunks together, before the plans of the later ones have arrived.

While the weights stay the same, a plan follows from the one before it. What is looked up for an expected plan is used
if the plan that arrives is equal, and dropped if not, so nothing depends on it. A look-up is about 200 numpy calls,
which take as long for one chunk of few sequences as for eight.
Of stored tokens, the places in the files are found as well. An error in them is raised by a look-up of the chunk alone.
Text is not looked up ahead, because its tokens are made where it is read.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mixtera_hpc.core.planner import ChunkPlan, Planner
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.packing.sequences_of_steps import PlannedSteps, SequencesOfSteps
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import StepContent, is_last_chunk, training_steps_of
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences

__all__ = ["FoundSteps", "StepsAhead", "documents_of_steps"]

MAX_CHUNKS = 8
"""Chunks that are looked up together, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSteps:
    """Steps of one plan whose documents were looked up."""

    planned: PlannedSteps
    contents: list[StepContent]
    documents: Documents
    sequences: StoredSequences | None
    """Of stored tokens, the sequences of these steps and others."""
    first: int
    """Number of the first step among the batches of `sequences`."""


class StepsAhead:
    """The steps of the next chunks. Not thread-safe."""

    def __init__(
        self, source: Source, contents: SequencesOfSteps, documents: SequenceDocuments, reader: DocumentReader
    ) -> None:
        """Look nothing up yet; the arguments are those of the same reading thread."""
        self._source = source
        self._contents = contents
        self._documents = documents
        self._reader = reader
        self._can_look_ahead = not source.layout.in_tokens or reader.holds_all_tokens
        self._found: deque[FoundSteps] = deque()
        self._newest: ChunkPlan | None = None
        """The plan that was served last."""
        self._num_chunks = 1
        """Chunks that were looked up together the last time."""

    def take(self, planned: PlannedSteps, max_steps: int) -> FoundSteps | None:
        """Return what is known of steps that are served now, or looked up with those of the next chunks.

        Args:
            planned: the steps.
            max_steps: steps that may be looked up together.

        Returns:
            None if these steps are to be looked up alone.
        """
        newest = self._newest
        self._newest = planned.plan
        if self._found:
            found = self._found.popleft()
            if found.planned.steps == planned.steps and found.planned.plan.is_equal(planned.plan):
                return found
            self._found.clear()
        if not self._can_look_ahead or planned.steps != training_steps_of(self._source, planned.plan, 0):
            # Another process serves some steps of the chunk, or the run continues inside of it.
            return None
        is_steady = newest is not None and _has_next(newest, planned.plan)
        self._num_chunks = min(2 * self._num_chunks, MAX_CHUNKS) if is_steady else 1
        num_chunks = min(self._num_chunks, max_steps // len(planned.steps))
        if num_chunks < 2:
            return None
        try:
            self._look_up(self._expected(planned, num_chunks))
        except Exception:
            # Of any kind: it is raised again when its own chunk is looked up.
            self.forget()
            return None
        return self._found.popleft()

    def forget(self) -> None:
        """Drop all steps of later chunks."""
        self._found.clear()
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
            self._found.append(
                FoundSteps(planned=planned, contents=own, documents=own_documents, sequences=sequences, first=begin)
            )


def documents_of_steps(documents: SequenceDocuments, contents: Sequence[StepContent]) -> Documents:
    """Return the documents of the sequences of some steps, one step after the other."""
    domain = np.concatenate([content.domain_ids[: content.num_sequences] for content in contents])
    sequence = np.concatenate([content.sequence[: content.num_sequences] for content in contents])
    return documents.documents(domain, sequence)


def _has_next(plan: ChunkPlan, following: ChunkPlan) -> bool:
    """Return True if a plan follows another one with the same weights."""
    return following.chunk == plan.chunk + 1 and np.array_equal(following.weights, plan.weights)


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
