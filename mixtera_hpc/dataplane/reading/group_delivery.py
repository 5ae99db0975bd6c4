"""`dataplane.delivery=lead`: one rank of a model-parallel group reads, and passes the batches on to its peers.

The leader starts the broadcast of a batch when it is ready, up to one step before its trainer asks for it. Peers have
posted their part by then, and run no reading thread and no worker processes. A message has a fixed size, so a batch
costs one broadcast inside the group: 9 bytes per token of the largest batch. The leader also passes on the end of the
data and an error, so that peers never wait for a batch that does not come. Nothing blocks; `get` polls.
"""

import contextlib
import queue
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator, wait
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.processes.process_feed import ProcessFeed
from mixtera_hpc.dataplane.reading.processes.workers import Workers, open_batch_source
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.steps.digests import batch_digests, sequence_digest
from mixtera_hpc.dataplane.steps.ready_agreement import NO_LIMIT
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import CommError, ConfigError, DataError, UserError

__all__ = ["BatchFeed", "FollowingFeed", "LeadingFeed", "check_delivery", "open_feed"]

NUM_HEADER = 4
"""Integers in front of a message: its kind, training step, chunk, and the rows of a batch or the length of a text."""

BATCH, END, USER_ERROR, ERROR = range(4)
"""Kinds of messages. `END` also says that the trainer leaves before the end of the data."""


class BatchFeed(Protocol):
    """The origin of the batches of a session: its own reading thread or processes, or the leader of its group."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """Places where this rank reads; empty if it does not."""

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Take a plan; its steps before `first_step` are skipped."""

    def get(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None after the end of the data.

        Raises:
            queue.Empty: no batch is ready within `timeout_s`.
        """

    @property
    def num_ready(self) -> int:
        """Batches that `get` returns without waiting; as many as possible if this rank never waits for a read."""

    def advance(self) -> None:
        """Pass on what is ready; does not block."""

    def finish(self) -> None:
        """Complete what peers may wait for. **Collective.**"""

    def close(self, timeout_s: float | None = None) -> None:
        """Stop reading; see `Prefetcher.close`."""


def check_delivery(source: Source) -> None:
    """Raise ConfigError if batches of `source` cannot be passed on."""
    if not source.layout.in_tokens:
        raise ConfigError(
            "dataplane.delivery=lead passes on tokens, but mixture.unit is samples.\n"
            "  Set dataplane.delivery=each: every rank of a group then reads its samples itself."
        )


def open_feed(source: Source, batch_slice: BatchSlice, group: Communicator | None, ranks_of_node: int) -> BatchFeed:
    """Open what this rank gets its batches from. **Collective** inside the group.

    Args:
        source: what is served.
        batch_slice: what this rank gets of every step.
        group: the ranks that get the same batches; None if no message passes between them.
        ranks_of_node: number of ranks on this node.
    """
    is_passed_on = group is not None and source.config.dataplane.delivery == "lead"
    if group is not None and is_passed_on and not batch_slice.is_group_leader:
        return FollowingFeed(group, source, batch_slice)
    maker = open_batch_source(source, batch_slice, ranks_of_node)
    prefetch_batches = source.config.dataplane.prefetch_batches
    own: BatchFeed
    if isinstance(maker, Workers) and source.layout.in_tokens:
        own = ProcessFeed(maker, prefetch_batches)
    else:
        # Samples of processes come through a socket, which a thread empties.
        own = Prefetcher(maker, prefetch_batches)
    return LeadingFeed(own, group, source, batch_slice) if group is not None and is_passed_on else own


class _Message:
    """A buffer that holds one batch, one error, or nothing but its kind."""

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        """Allocate the message for `num_rows` sequences of `num_tokens` tokens each."""
        self.buffer = np.zeros(8 * NUM_HEADER + num_rows * (8 + 8 * num_tokens + num_tokens - 1), np.uint8)
        self.header = self.buffer[: 8 * NUM_HEADER].view(np.int64)
        self._content = self.buffer[8 * NUM_HEADER :]
        shapes = (
            (np.dtype(np.int64), (num_rows,)),
            (np.dtype(np.int32), (num_rows, num_tokens)),
            (np.dtype(np.int32), (num_rows, num_tokens)),
            (np.dtype(np.bool_), (num_rows, num_tokens - 1)),
        )
        views: list[NDArray[Any]] = []
        begin = 0
        for dtype, shape in shapes:
            end = begin + dtype.itemsize * int(np.prod(shape))
            views.append(self._content[begin:end].view(dtype).reshape(shape))
            begin = end
        self.domain_ids, self.tokens, self.document_ids, self.loss_mask = views

    def put_batch(self, batch: Batch) -> None:
        """Write a batch."""
        # A batch ramp begins with smaller batches.
        count = len(batch.domain_ids)
        self.header[:] = BATCH, batch.step, batch.chunk, count
        self.domain_ids[:count] = batch.domain_ids
        self.tokens[:count] = batch.tokens
        self.document_ids[:count] = batch.document_ids
        self.loss_mask[:count] = batch.loss_mask

    def put_end(self) -> None:
        """Write that no batch follows."""
        self.header[:] = END, 0, 0, 0

    def put_error(self, error: BaseException) -> None:
        """Write the text of an error, as much of it as fits."""
        text = str(error).encode()[: len(self._content)]
        self.header[:] = USER_ERROR if isinstance(error, UserError) else ERROR, 0, 0, len(text)
        self._content[: len(text)] = np.frombuffer(text, np.uint8)

    def text(self) -> str:
        """Return the text of an error."""
        return self._content[: int(self.header[3])].tobytes().decode(errors="replace")


class LeadingFeed:
    """The batches of a leader, which passes each of them on to its peers."""

    def __init__(self, own: BatchFeed, group: Communicator, source: Source, batch_slice: BatchSlice) -> None:
        """Pass on the batches of `own`, over a duplicate of `group`. **Collective.**"""
        self._own = own
        self.places = own.places
        self._group = group.Dup()
        self._shape = (batch_slice.size_of(source.planner.batch_schedule.largest), source.grid.length)
        self._ready: deque[Batch] = deque()
        """Passed on, and not handed out yet."""
        self._sent: deque[tuple[_Message, CollectiveRequest]] = deque()
        """Broadcasts in progress, with the messages that they read."""
        self._has_ended = False

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        self._own.submit(plan, first_step)

    def get(self, timeout_s: float) -> Batch | None:
        if not self._ready and not self._has_ended:
            self._pass_on(timeout_s)
        # After the end, the feed repeats it, or its error.
        batch = self._ready.popleft() if self._ready else self._own.get(timeout_s)
        self.advance()
        return batch

    @property
    def num_ready(self) -> int:
        return len(self._ready) + self._own.num_ready

    def advance(self) -> None:
        while self._sent and self._sent[0][1].Test():
            self._sent.popleft()
        self._own.advance()
        # One batch ahead of the trainer: its broadcast overlaps with the step.
        if not self._ready and not self._has_ended:
            with contextlib.suppress(queue.Empty):
                self._pass_on(timeout_s=0.0)

    def finish(self) -> None:
        if not self._has_ended:
            message = _Message(*self._shape)
            message.put_end()
            self._send(message)
            self._has_ended = True
        for _, request in self._sent:
            wait(request)
        self._sent.clear()

    def close(self, timeout_s: float | None = None) -> None:
        self._own.close(timeout_s)

    def _pass_on(self, timeout_s: float) -> None:
        """Take the next batch of this rank and start its broadcast, or that of the end or an error."""
        message = _Message(*self._shape)
        try:
            batch = self._own.get(timeout_s)
        except queue.Empty:
            raise
        except BaseException as error:
            # Raised by the next `get`: the trainer may still have to be given a batch before it.
            batch = None
            message.put_error(error)
        else:
            if batch is None:
                message.put_end()
            else:
                message.put_batch(batch)
                self._ready.append(batch)
        self._has_ended = batch is None
        self._send(message)

    def _send(self, message: _Message) -> None:
        self._sent.append((message, self._group.Ibcast(message.buffer)))


class FollowingFeed:
    """The batches of a rank whose group has another leader."""

    def __init__(self, group: Communicator, source: Source, batch_slice: BatchSlice) -> None:
        """Receive over a duplicate of `group`. **Collective.**"""
        self.places: Sequence[ReadPlace] = ()
        self._group = group.Dup()
        self._shape = (batch_slice.size_of(source.planner.batch_schedule.largest), source.grid.length)
        self._slice = batch_slice
        self._is_audited = source.config.dataplane.audit
        self._plan_digests: dict[int, int] = {}
        """Chunk → digest of its plan, as this rank received it."""
        self._end: _Message | None = None
        self._message: _Message | None = None
        self._request: CollectiveRequest | None = None
        self._post()

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        self._plan_digests[plan.chunk] = plan.digest

    def get(self, timeout_s: float) -> Batch | None:
        message = self._received(timeout_s)
        kind = int(message.header[0])
        if kind == BATCH:
            # The plan of a new chunk may arrive after the batch that the leader made from it.
            chunk = int(message.header[2])
            if chunk not in self._plan_digests:
                time.sleep(timeout_s)
                raise queue.Empty
            batch = self._batch_of(message)
            self._plan_digests = {number: digest for number, digest in self._plan_digests.items() if number >= chunk}
            self._post()
            return batch
        self._end = message
        if kind == USER_ERROR:
            raise DataError(f"The leader of this rank's group could not read a batch: {message.text()}")
        if kind == ERROR:
            raise CommError(f"The leader of this rank's group failed while it read a batch: {message.text()}")
        return None

    @property
    def num_ready(self) -> int:
        # The leader answers for its group.
        return NO_LIMIT

    def advance(self) -> None:
        # MPI moves messages only while somebody asks.
        if self._request is not None:
            self._request.Test()

    def finish(self) -> None:
        # The leader may have passed on a batch that nobody will ask for.
        while self._end is None:
            assert self._request is not None and self._message is not None  # Posted whenever the end is unknown.
            wait(self._request)
            if int(self._message.header[0]) != BATCH:
                self._end = self._message
            else:
                self._post()

    def close(self, timeout_s: float | None = None) -> None:
        """Do nothing: this rank runs no reading thread."""

    def _post(self) -> None:
        self._message = _Message(*self._shape)
        self._request = self._group.Ibcast(self._message.buffer)

    def _received(self, timeout_s: float) -> _Message:
        """Return the message that arrived, the last one again after the end."""
        if self._end is not None:
            return self._end
        assert self._request is not None and self._message is not None  # Posted whenever the end is unknown.
        if not self._request.Test():
            time.sleep(timeout_s)
            if not self._request.Test():
                raise queue.Empty
        return self._message

    def _batch_of(self, message: _Message) -> Batch:
        count = int(message.header[3])
        tokens = message.tokens[:count].astype(np.int64)
        domain_ids = message.domain_ids[:count].copy()
        # Of what arrived here, not of what the leader sent.
        digests = batch_digests(tokens, domain_ids < 0, sequence_digest) if self._is_audited else None
        chunk = int(message.header[2])
        return Batch(
            step=int(message.header[1]),
            domain_ids=domain_ids,
            positions=np.arange(count) + self._slice.group * count,
            tokens=tokens,
            loss_mask=message.loss_mask[:count].copy(),
            document_ids=message.document_ids[:count].copy(),
            digests=digests,
            chunk=chunk,
            plan_digest=self._plan_digests[chunk],
        )
