"""From a chunk plan to this rank's batches, in a background thread.

The thread expands plans, reads, decompresses, tokenizes and packs; it never talks MPI. It stays at most `prefetch_batches`
ahead. What goes wrong in it is raised in the main thread, at the step it belongs to.
"""

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.planner import ChunkPlan, Slots
from mixtera_hpc.dataplane.journal import sample_digest, sequence_digest
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader, PackedTokens
from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import ConfigError, MixteraError

__all__ = ["Batch", "BatchMaker", "BatchSlice", "BatchSource", "Prefetcher", "steps_per_read", "training_steps_of"]

TOKENS_TOGETHER = 1 << 18
SAMPLE_BYTES_TOGETHER = 4 << 20
"""Bounds on the steps that are read together, at least one: enough to make calls rare, milliseconds to wait for."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank gets of one step; B sequences of T predicted tokens, or B samples."""

    step: int
    domain_ids: Ints
    """Shape (B,)."""
    positions: Ints
    """Of the sequences in the global batch; shape (B,)."""
    tokens: Ints
    """Shape (B, T + 1); (B, 0) with `mixture.unit=samples`."""
    loss_mask: NDArray[np.bool_]
    """Which predicted tokens count; shape (B, T)."""
    document_ids: NDArray[np.int32]
    """Which document of its sequence each token belongs to, from 0; shape (B, T + 1)."""
    payloads: list[Any] | None = None
    """The raw samples with `mixture.unit=samples`, B of them."""
    digests: list[str] | None = None
    """Of each sequence's tokens, or of each sample, when audited."""
    chunk: int = 0
    plan_digest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSlice:
    """Which part of every global batch a rank gets: the same for all ranks of its dp_group."""

    first: int
    """First position in the global batch."""
    size: int
    """Sequences per step."""
    is_group_leader: bool = True
    """Whether the rank is the first of its dp_group: it alone counts in sums over ranks."""

    @classmethod
    def of(cls, plane: DataPlaneConfig, rank: int, num_ranks: int) -> "BatchSlice":
        """What `rank` of a job gets.

        Raises:
            ConfigError: the global batch cannot be shared evenly.
        """
        groups, left = divmod(num_ranks, plane.model_parallel_size)
        if left:
            raise ConfigError(
                f"dataplane.model_parallel_size is {plane.model_parallel_size}, which does not divide the {num_ranks} ranks that were "
                f"started.\n  Start a multiple of {plane.model_parallel_size} ranks, or change it."
            )
        if plane.global_batch_size % groups:
            raise ConfigError(
                f"dataplane.global_batch_size={plane.global_batch_size} cannot be shared evenly by {num_ranks} ranks in "
                f"groups of {plane.model_parallel_size} (dataplane.model_parallel_size).\n  Change the number of ranks, or make it a multiple of {groups}."
            )
        return cls.of_rank(rank, num_ranks, plane.model_parallel_size, plane.global_batch_size)

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, model_parallel_size: int, global_batch_size: int) -> "BatchSlice":
        size = global_batch_size // (num_ranks // model_parallel_size)
        return cls(first=rank // model_parallel_size * size, size=size, is_group_leader=rank % model_parallel_size == 0)


class BatchSource(Protocol):
    """Where batches come from."""

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """This rank's batches of `plan`, from training step `first_step` on."""

    def close(self) -> None:
        """Free what is held; nothing is being made."""


class BatchMaker:
    """Makes batches from slots. Not thread-safe."""

    def __init__(self, source: Source, share: BatchSlice, audit: bool) -> None:
        self._source = source
        self._share = share
        self._audit = audit
        self._streams: DomainStreams = source.streams()
        self._reader = DocumentReader(source)
        self._together = steps_per_read(source, share)
        self._expanded: tuple[ChunkPlan, Slots] | None = None

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """This rank's batches of `plan`, from training step `first_step` on."""
        return self.batches_of(plan, training_steps_of(self._source, plan, first_step))

    def batches_of(self, plan: ChunkPlan, steps: range) -> Iterator[Batch]:
        """This rank's batches of some steps of `plan`.

        Several steps are read together, but what is wrong with the data of a step is raised at that step.
        """
        slots = self._slots(plan)
        for first in range(0, len(steps), self._together):
            some = [self._step(plan, step, slots) for step in steps[first : first + self._together]]
            try:
                filled = self._filled(plan, some)
            except MixteraError:
                for step in some:
                    yield from self._filled(plan, [step])
            else:
                yield from filled

    def close(self) -> None:
        self._reader.close()

    def _slots(self, plan: ChunkPlan) -> Slots:
        if self._expanded is None or self._expanded[0] is not plan:
            self._expanded = plan, self._source.planner.slots(plan)
        return self._expanded[1]

    def _step(self, plan: ChunkPlan, step: int, slots: Slots) -> "_Step":
        """What this rank has to read for one step."""
        data_step = self._source.stream_version.data_step(step)
        start = (data_step - plan.first_step) * self._source.planner.global_batch_size + self._share.first
        mine = slice(start, start + self._share.size)
        domain, ordinal = slots.domain[mine], slots.ordinal[mine]
        by_domain = np.argsort(domain, kind="stable")
        borders = np.flatnonzero(np.diff(domain[by_domain])) + 1
        rows = np.split(by_domain, borders)
        return _Step(step, domain, [_Run(int(domain[r[0]]), int(ordinal[r[0]]), r.tolist()) for r in rows])

    def _filled(self, plan: ChunkPlan, steps: "list[_Step]") -> list[Batch]:
        """Batches of consecutive steps, read together domain by domain."""
        runs = sorted(((run, at) for at, step in enumerate(steps) for run in step.runs), key=lambda r: r[0].domain)
        spans = [self._source.span(run.domain, run.first, len(run.rows)) for run, _ in runs]
        parts: dict[int, Documents] = {}
        for domain, some in itertools.groupby(range(len(runs)), key=lambda i: runs[i][0].domain):
            parts[domain] = self._streams.documents_of(domain, [spans[i] for i in some])
        documents = Documents.join(list(parts.values()))
        if not self._source.layout.in_tokens:
            return self._batches_of_samples(plan, steps, runs, self._reader.payloads(documents))
        last = np.cumsum([len(part.block) for part in parts.values()]) - 1
        span = self._reader.read(documents, dict(zip(parts, last.tolist(), strict=True)))
        ends = itertools.accumulate(stop - start for start, stop in spans)
        placed = [
            (run, at, end - (stop - start)) for (run, at), end, (start, stop) in zip(runs, ends, spans, strict=True)
        ]
        return self._batches_of_tokens(plan, steps, placed, span)

    def _batches_of_tokens(
        self, plan: ChunkPlan, steps: "list[_Step]", placed: "list[tuple[_Run, int, int]]", span: PackedTokens
    ) -> list[Batch]:
        """Cut what was read into sequences: runs, the position of their step and where they begin in `span`."""
        grid, count = self._source.grid, self._share.size
        starts = np.empty((len(steps), count), np.int64)
        for run, at, begin in placed:
            starts[at, run.rows] = begin + grid.stride * np.arange(len(run.rows))
        tokens = sliding_window_view(span.tokens, grid.length)
        documents = sliding_window_view(span.document, grid.length)
        everywhere = self._source.config.dataplane.predict_across_documents
        goes_on = sliding_window_view(np.ones_like(span.goes_on) if everywhere else span.goes_on, grid.length - 1)
        return [
            self._batch(
                plan,
                step,
                tokens=(found := tokens[first].astype(np.int64)),
                document_ids=documents[first] - span.document[first, None],
                loss_mask=goes_on[first + 1],
                digests=self._digests(found),
            )
            for step, first in zip(steps, starts, strict=True)
        ]

    def _digests(self, tokens: Ints) -> list[str] | None:
        return [sequence_digest(t) for t in tokens] if self._audit else None

    def _batches_of_samples(
        self, plan: ChunkPlan, steps: "list[_Step]", runs: "list[tuple[_Run, int]]", found: list[Any]
    ) -> list[Batch]:
        count, remaining = self._share.size, iter(found)
        payloads: list[list[Any]] = [[None] * count for _ in steps]
        for run, at in runs:
            for row in run.rows:
                payloads[at][row] = next(remaining)
        none = {
            "tokens": np.empty((count, 0), np.int64),
            "document_ids": np.empty((count, 0), np.int32),
            "loss_mask": np.empty((count, 0), np.bool_),
        }
        return [
            self._batch(
                plan, step, **none, payloads=p, digests=[sample_digest(sample) for sample in p] if self._audit else None
            )
            for step, p in zip(steps, payloads, strict=True)
        ]

    def _batch(self, plan: ChunkPlan, step: "_Step", **content: Any) -> Batch:
        return Batch(
            step=step.number,
            domain_ids=step.domain.astype(np.int64),
            positions=np.arange(self._share.first, self._share.first + self._share.size),
            chunk=plan.chunk,
            plan_digest=plan.digest,
            **content,
        )


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    domain: NDArray[np.int32]
    """Of each of this rank's sequences."""
    runs: list["_Run"]


@dataclass(frozen=True, slots=True)
class _Run:
    """This rank's sequences of one domain in one step: neighbours in its stream."""

    domain: int
    first: int
    """Ordinal of the first sequence."""
    rows: list[int]
    """Of the batch, in order."""


def training_steps_of(source: Source, plan: ChunkPlan, first_step: int) -> range:
    """The training steps of `plan` from `first_step` on."""
    era = source.stream_version
    return range(max(first_step, era.step_at(plan.first_step)), era.step_at(plan.first_step + plan.num_steps))


def steps_per_read(source: Source, share: BatchSlice) -> int:
    """How many steps are read together: some tokens' worth, or some samples' of usual size."""
    if source.layout.in_tokens:
        return max(1, TOKENS_TOGETHER // (share.size * source.grid.length))
    blocks = source.blocks
    samples = SAMPLE_BYTES_TOGETHER * int(blocks.rows.sum(dtype=np.int64)) // max(int(blocks.length.sum()), 1)
    return max(1, samples // share.size)


@dataclass(frozen=True, slots=True)
class _Work:
    plan: ChunkPlan
    first_step: int


class _End:
    """The data has ended."""


class Prefetcher:
    """Makes batches in a daemon thread, between a queue of plans and a bounded queue of batches."""

    def __init__(self, maker: BatchSource, prefetch_batches: int) -> None:
        self._maker = maker
        self._plans: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Batch | _End | BaseException] = queue.Queue(maxsize=prefetch_batches)
        self._end: _End | BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Queue a plan; its steps before `first_step` are skipped."""
        self._plans.put(_Work(plan, first_step))

    def get(self, timeout_s: float) -> Batch | None:
        """The next batch; None when the data has ended, however often one asks.

        Raises:
            queue.Empty: nothing is ready within `timeout_s`.
            Exception: whatever went wrong in the thread, from then on.
        """
        item = self._end or self._ready.get(timeout=timeout_s)
        if isinstance(item, Batch):
            return item
        self._end = item
        if isinstance(item, BaseException):
            raise item
        return None

    def close(self, timeout_s: float | None = None) -> None:
        """Stop the thread, dropping what it has prepared.

        Args:
            timeout_s: leave it alone when a read takes longer: it frees what it holds then; None waits, so that what it reads
                may be freed.
        """
        self._stopping.set()
        self._plans.put(None)
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        try:
            while (work := self._plans.get()) is not None:
                for batch in self._maker.batches(work.plan, work.first_step):
                    if not self._put(batch):
                        return
                if work.plan.last:
                    self._put(_End())
                    return
        except BaseException as error:
            self._put(error)
        finally:
            self._maker.close()

    def _put(self, item: Batch | _End | BaseException) -> bool:
        """Wait for room; False when the consumer is gone."""
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
