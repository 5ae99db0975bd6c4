"""From a chunk plan to this rank's batches, in a background thread.

The thread expands plans, reads, decompresses, tokenizes and packs; it never talks MPI. It stays at most `prefetch_batches`
ahead. What goes wrong in it is raised in the main thread, at the step it belongs to.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import ChunkPlan, Slots
from mixtera_hpc.dataplane.expand import Streams
from mixtera_hpc.dataplane.journal import sequence_digest
from mixtera_hpc.dataplane.read import DocumentReader
from mixtera_hpc.dataplane.source import Source

__all__ = ["Batch", "BatchMaker", "Prefetcher", "Share"]

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
    """Of each sequence's tokens, when audited."""
    chunk: int = 0
    plan_digest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of every global batch a rank gets: the same for all ranks of its dp_group."""

    first: int
    """First position in the global batch."""
    size: int
    """Sequences per step."""

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, dp_group_size: int, global_batch_size: int) -> "Share":
        size = global_batch_size // (num_ranks // dp_group_size)
        return cls(first=rank // dp_group_size * size, size=size)


class BatchMaker:
    """Makes batches from slots. Not thread-safe."""

    def __init__(self, source: Source, share: Share, audit: bool) -> None:
        self._source = source
        self._share = share
        self._audit = audit
        self._streams: Streams = source.streams()
        self._reader = DocumentReader(source)

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """This rank's batches of `plan`, from `first_step` on."""
        slots = self._source.planner.slots(plan)
        global_batch = self._source.planner.global_batch_size
        for step in range(max(first_step, plan.first_step), plan.first_step + plan.num_steps):
            start = (step - plan.first_step) * global_batch + self._share.first
            yield self._batch(plan, step, slots, slice(start, start + self._share.size))

    def close(self) -> None:
        self._reader.close()

    def _batch(self, plan: ChunkPlan, step: int, slots: Slots, mine: slice) -> Batch:
        domain, ordinal = slots.domain[mine], slots.ordinal[mine]
        length = self._source.grid.length if self._source.layout.in_tokens else 0
        tokens = np.empty((len(domain), length), np.int64)
        documents = np.zeros((len(domain), length), np.int32)
        mask = np.ones((len(domain), max(length - 1, 0)), np.bool_)
        payloads: list[Any] | None = None if length else [None] * len(domain)
        for number in np.unique(domain):
            rows = np.flatnonzero(domain == number)
            if payloads is None:
                self._fill(int(number), int(ordinal[rows[0]]), rows, (tokens, documents, mask))
            else:
                found = self._payloads(int(number), int(ordinal[rows[0]]), len(rows))
                for row, payload in zip(rows.tolist(), found, strict=True):
                    payloads[row] = payload
        return Batch(
            step=step,
            domain_ids=domain.astype(np.int64),
            positions=np.arange(self._share.first, self._share.first + self._share.size),
            tokens=tokens,
            loss_mask=mask,
            document_ids=documents,
            payloads=payloads,
            digests=[sequence_digest(t) for t in tokens] if self._audit and length else None,
            chunk=plan.chunk,
            plan_digest=plan.digest,
        )

    def _fill(self, domain: int, first: int, rows: NDArray[np.intp], out: tuple[Any, Any, Any]) -> None:
        """Cut one span into the sequences of a domain: this rank's are neighbours in the stream."""
        grid, (tokens, documents, mask) = self._source.grid, out
        span = self._reader.span(domain, self._streams.documents(domain, *grid.span(first, len(rows))))
        at = np.arange(len(rows))[:, None] * grid.stride + np.arange(grid.length)[None, :]
        tokens[rows] = span.tokens[at]
        documents[rows] = span.document[at] - span.document[at[:, :1]]
        if not self._source.config.dataplane.predict_across_documents:
            mask[rows] = ~span.is_first[at[:, 1:]]

    def _payloads(self, domain: int, first: int, count: int) -> list[Any]:
        start, stop = self._source.grid.span(first, count)
        return self._reader.payloads(self._streams.documents(domain, start, stop))


@dataclass(frozen=True, slots=True)
class _Work:
    plan: ChunkPlan
    first_step: int


class _End:
    """The data has ended."""


class Prefetcher:
    """Runs a `BatchMaker` in a daemon thread, between a queue of plans and a bounded queue of batches."""

    def __init__(self, maker: BatchMaker, prefetch_batches: int) -> None:
        self._maker = maker
        self._plans: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Batch | _End | BaseException] = queue.Queue(maxsize=prefetch_batches)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Queue a plan; its steps before `first_step` are skipped."""
        self._plans.put(_Work(plan, first_step))

    def get(self, timeout_s: float) -> Batch | None:
        """The next batch; None when the data has ended.

        Raises:
            queue.Empty: nothing is ready within `timeout_s`.
            Exception: whatever went wrong in the thread.
        """
        item = self._ready.get(timeout=timeout_s)
        if isinstance(item, BaseException):
            raise item
        return item if isinstance(item, Batch) else None

    def close(self) -> None:
        """Stop the thread, dropping what it has prepared."""
        self._stopping.set()
        self._plans.put(None)
        self._thread.join(timeout=10.0)
        self._maker.close()

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

    def _put(self, item: Batch | _End | BaseException) -> bool:
        """Wait for room; False when the consumer is gone."""
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
