"""Make one rank's batches of a chunk plan: find their sequences and documents, and read the tokens.

The documents of several steps are looked up and read together, so that a document which two of their sequences share is
read once. Their tokens are written to the batches of a few steps at a time, when these are asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.packing.check_packing import COST_OF_TRANSFORM
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.packing.micro_batches import cut_by_budget
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice, BatchTimes
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader, RawSamples
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.lookup.steps_ahead import StepLookup, StepsAhead, documents_of_steps
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.packing.sequences_of_steps import PlannedSteps, SequencesOfSteps
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays, keep_freed_memory
from mixtera_hpc.dataplane.reading.sample_transform import (
    CostedSample,
    ServedSample,
    Transform,
    check_cost,
    load_transform,
    transformed,
)
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import StepContent, is_last_chunk, training_steps_of
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences
from mixtera_hpc.dataplane.reading.stored.token_gather import blocks_with_tokens
from mixtera_hpc.dataplane.steps.digests import batch_digests, sample_digest, sequence_digest
from mixtera_hpc.dataplane.watchdog.progress import IDLE, ReadPlace
from mixtera_hpc.errors import MixteraError

__all__ = ["BatchMaker", "items_per_read", "steps_per_read"]

TOKENS_PER_READ = 1 << 19
STORED_TOKENS_PER_READ = 1 << 23
SAMPLE_BYTES_PER_READ = 4 << 20
"""Target sizes of what is read together: few calls, but each read takes only milliseconds. A read of stored tokens only
finds their places; the tokens are copied when their batch is made."""
TOKENS_PER_WRITE = 1 << 19
"""Target size of the batches that are written together. They take 6.8 MB, so that the memory of batches that the
trainer has freed is written again while it is in the processor's cache."""

Ints = NDArray[np.int64]


class BatchMaker:
    """Makes batches in this process. Not thread-safe."""

    def __init__(
        self,
        source: Source,
        batch_slice: BatchSlice,
        *,
        audit: bool,
        raw: bool = False,
        compare_every_read: bool = False,
    ) -> None:
        """Open nothing yet.

        Args:
            source: the data.
            batch_slice: the part of every global batch that is made.
            audit: add digests to the batches.
            raw: leave samples as they are in the data, without `data.transform`.
            compare_every_read: compare files with the index after every read, however fast reads follow each other.

        Raises:
            ConfigError: `data.transform` cannot be imported.
        """
        keep_freed_memory()
        self._source = source
        self._slice = batch_slice
        self._items_per_read = items_per_read(source)
        self._audit = audit
        self._compare_every_read = compare_every_read
        self._streams = source.streams()
        self._documents = SequenceDocuments(source, self._streams)
        self._contents = SequencesOfSteps(source, batch_slice, self._documents)
        # With more ranks than lanes, several ranks share the rows of a window.
        window_share = min(source.lanes.lanes / batch_slice.num_groups, 1.0)
        self._reader = DocumentReader(source, self._streams, window_share)
        self._ahead = StepsAhead(source, self._contents, self._documents, self._reader)
        self._transform = None if raw else load_transform(source.config.data.transform)
        self.shared_arrays: Mapping[int, TokenArrays] = {}
        """Step → memory for its batch of tokens; the batches of other steps get memory of their own."""
        self.next_is_made = False
        """See `BatchSource`."""
        self._plan_digest: tuple[ChunkPlan, int] | None = None
        """The digest of the plan that was used last."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """The place of this reader."""
        return [self._reader.place]

    def write_place(self, place: ReadPlace) -> None:
        """Record in `place` where this reader is, from now on."""
        self._reader.place = place

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """Yield this rank's batches of `plan`, from training step `first_step` on."""
        return self.batches_of(plan, training_steps_of(self._source, plan, first_step))

    def batches_of(self, plan: ChunkPlan, steps: range) -> Iterator[Batch]:
        """Yield this rank's batches of some training steps of `plan`.

        Several steps are read together, but an error in the data of a step is raised at that step. If there are no
        steps and this is the last chunk, the files of earlier reads are compared with the index.
        """
        size = steps_per_read(self._source, self._slice, self._items_per_read, plan)
        self._reader.comparison.pace.every_read = self._compare_every_read or is_last_chunk(self._source, plan)
        if not steps:
            self._reader.comparison.check()
        for first in range(0, len(steps), size):
            self._reader.place.begin(steps[first])
            planned = PlannedSteps(plan, steps[first : first + size])
            lookup = self._ahead.take(planned, size)
            contents = lookup.contents if lookup is not None else self._contents.of([planned])
            groups = self._read_unchanged(plan, contents, lookup)
            try:
                # All documents are read before the first batch.
                batches = next(groups)
            except MixteraError:
                self._ahead.forget()
                # If a file has changed, this explains the error. After a change, its rows may be in memory.
                self._reader.comparison.compare()
                # Read step by step, so that the steps before the damaged one are served.
                self._reader.comparison.pace.every_read = True
                for content in contents:
                    yield from chain.from_iterable(self._read_unchanged(plan, [content]))
            else:
                for group in chain([batches], groups):
                    yield from self._timed(group)

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches with the time that it took to make them.

        Those of a list are removed from it, so that only the trainer holds them. The memory that it frees is written
        again for the next ones.
        """
        is_first = True
        made = batches if isinstance(batches, list) else []
        for batch in _taken_from(made) if made else batches:
            self.next_is_made = len(made) > 0
            self._reader.place.enter(IDLE)
            # Batches of samples are made one by one, those of tokens together with the first one.
            if is_first or batch.payloads is not None:
                batch = replace(batch, times=BatchTimes(self._reader.place.take_times()))
            is_first = False
            yield batch

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _digest_of(self, plan: ChunkPlan) -> int:
        if self._plan_digest is None or self._plan_digest[0] is not plan:
            self._plan_digest = plan, plan.digest
        return self._plan_digest[1]

    def _read_unchanged(
        self, plan: ChunkPlan, steps: list[StepContent], lookup: StepLookup | None = None
    ) -> Iterator[Iterable[Batch]]:
        """Yield the batches of consecutive steps in groups, unless a shard that was read has changed."""
        for batches in self._read_steps(plan, steps, lookup):
            self._reader.comparison.check()
            yield batches

    def _read_steps(
        self, plan: ChunkPlan, steps: list[StepContent], lookup: StepLookup | None
    ) -> Iterable[Iterable[Batch]]:
        """Return groups of the batches of consecutive steps, whose documents are read together.

        Args:
            plan: the plan of the steps.
            steps: the content of the steps.
            lookup: the look-up of the steps; None if they are to be looked up here.
        """
        if not any(content.num_sequences for content in steps):
            return [[self._padding(plan, content) for content in steps]]
        documents = documents_of_steps(self._documents, steps) if lookup is None else lookup.documents
        if not self._source.layout.in_tokens:
            return [self._sample_batches(plan, steps, documents, self._reader.samples(documents))]
        if lookup is not None and lookup.sequences is not None:
            return self._token_batches(plan, steps, lookup.sequences, lookup.first)
        return self._token_batches(plan, steps, self._reader.sequences(documents, steps), 0)

    def _token_batches(
        self, plan: ChunkPlan, steps: list[StepContent], sequences: StoredSequences, first_number: int
    ) -> Iterator[list[Batch]]:
        """Write the tokens of each step, a few steps at a time.

        Args:
            plan: the plan of the steps.
            steps: the content of the steps.
            sequences: the sequences of these steps, and maybe others.
            first_number: number of the first step among the batches of `sequences`.
        """
        shards = None
        size = max(1, TOKENS_PER_WRITE // (len(steps[0].domain_ids) * self._source.grid.stride))
        for first in range(0, len(steps), size):
            group = steps[first : first + size]
            number = first_number + first
            if number:
                # Time may have passed since the documents were found, or the batches before were written.
                if shards is None:
                    shards = sequences.shards_of(range(first_number, first_number + len(steps)))
                self._reader.use_again(shards, group[0].step)
            batches = []
            for content in group:
                memory = self.shared_arrays.get(content.step)
                # No variable here holds an array.
                batches.append(self._batch(plan, content, None, **sequences.write(number, memory)._asdict()))
                number += 1
            yield batches

    def _sample_batches(
        self, plan: ChunkPlan, steps: list[StepContent], documents: Documents, samples: RawSamples
    ) -> Iterator[Batch]:
        """Distribute the samples of `documents`, one per sequence, to the batches of the steps."""
        first = 0
        for content in steps:
            count = len(content.domain_ids)
            payloads = samples.take(content.num_sequences)
            payloads += [None] * (count - content.num_sequences)
            batch = self._batch(plan, content, payloads=payloads, **_no_tokens(count))
            # Digests are of the raw rows, so that a proof does not depend on the user's function.
            if self._transform is not None:
                batch = self._transformed(self._transform, batch, documents, first)
            first += content.num_sequences
            yield batch

    def _transformed(self, transform: Transform, batch: Batch, documents: Documents, first: int) -> Batch:
        """Return a batch with samples as `data.transform` makes them, in micro-batches if it gives their costs.

        Args:
            transform: the function.
            batch: the raw samples.
            documents: those of several batches.
            first: position of the first sample among these documents.
        """
        plane = self._source.config.dataplane
        budget = plane.sample_budget if plane.sample_cost == COST_OF_TRANSFORM else None
        index = self._source.index
        blocks = self._source.blocks
        samples: list[Any] = [None] * len(batch.positions)
        costs = np.zeros(len(batch.positions))
        for row in np.flatnonzero(~batch.is_padding).tolist():
            number = first + row
            block = int(documents.block[number])
            shard = index.shard_paths[int(blocks.shard[block])]
            served = ServedSample(
                seed=self._source.config.dataplane.seed,
                step=self._source.stream_version.data_step(batch.step),
                position=int(batch.positions[row]),
                shard=shard,
                row=int(blocks.first_row[block]) + int(documents.row[number]),
                root=index.root_of(shard),
            )
            result = transformed(transform, (batch.payloads or [])[row], served)
            if budget is not None:
                check_cost(result, served, budget)
                costs[row] = result.cost
            samples[row] = result.sample if isinstance(result, CostedSample) else result
        micro_batches = batch.micro_batches if budget is None else cut_by_budget(costs, budget)
        return replace(batch, payloads=samples, micro_batches=micro_batches)

    def _padding(self, plan: ChunkPlan, content: StepContent) -> Batch:
        """Return a batch of nothing but padding."""
        count = len(content.domain_ids)
        if not self._source.layout.in_tokens:
            return self._batch(plan, content, payloads=[None] * count, **_no_tokens(count))
        arrays = self.shared_arrays.get(content.step)
        arrays = TokenArrays.new(count, self._source.grid.length) if arrays is None else arrays.rows(count)
        for rows in arrays:
            rows[...] = 0
        return self._batch(plan, content, None, **arrays._asdict())

    def _batch(self, plan: ChunkPlan, content: StepContent, payloads: list[Any] | None, **fields: Any) -> Batch:
        digests: list[str] | None = None
        if self._audit:
            if payloads is None:
                digests = batch_digests(fields["tokens"], content.is_padding, sequence_digest)
            else:
                digests = batch_digests(payloads, content.is_padding, sample_digest)
        size = len(content.domain_ids)
        return Batch(
            step=content.step,
            domain_ids=content.domain_ids,
            positions=np.arange(self._slice.group * size, (self._slice.group + 1) * size),
            payloads=payloads,
            digests=digests,
            chunk=plan.chunk,
            plan_digest=self._digest_of(plan),
            micro_batches=content.micro_batches,
            **fields,
        )


def _taken_from(batches: list[Batch]) -> Iterator[Batch]:
    """Yield the batches of a list, and remove each of them from it."""
    batches.reverse()
    while batches:
        yield batches.pop()


def _no_tokens(count: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a batch of `count` samples, which have no tokens."""
    return {
        "tokens": np.empty((count, 0), np.int64),
        "document_ids": np.empty((count, 0), np.int32),
        "loss_mask": np.empty((count, 0), np.bool_),
    }


def items_per_read(source: Source) -> int:
    """Return how many tokens, or samples, are read together. Price: a pass over all blocks of the index."""
    if source.layout.in_tokens:
        return STORED_TOKENS_PER_READ if blocks_with_tokens(source).all() else TOKENS_PER_READ
    # The average over the whole index is good enough: only the size of reads depends on it.
    num_samples = int(source.blocks.rows.sum(dtype=np.int64))
    num_bytes = max(int(source.blocks.length.sum()), 1)
    return SAMPLE_BYTES_PER_READ * num_samples // num_bytes


def steps_per_read(source: Source, batch_slice: BatchSlice, num_items: int, plan: ChunkPlan | None = None) -> int:
    """Return how many steps of `plan`, or of the first chunk, are read together, at least 1.

    Args:
        source: the data.
        batch_slice: the part of each batch.
        num_items: tokens or samples that are read together, see `items_per_read`.
        plan: the plan of a chunk.
    """
    # A past stage of a batch ramp may have fewer sequences than there are groups.
    size = max(batch_slice.size_of(source.planner.batch_schedule.size_at(plan.first_step if plan else 0)), 1)
    if source.layout.in_tokens:
        return max(1, round(num_items / (size * source.grid.length)))
    return max(1, num_items // size)
