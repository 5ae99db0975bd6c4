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

import numpy as np

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator, wait
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.delivery.batch_feed import BatchFeed
from mixtera_hpc.dataplane.reading.delivery.batch_message import BATCH, ERROR, USER_ERROR, BatchMessage
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.steps.digests import batch_digests, sequence_digest
from mixtera_hpc.dataplane.steps.ready_agreement import NO_LIMIT
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import CommError, DataError

__all__ = ["FollowingFeed", "LeadingFeed"]


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
        self._sent: deque[tuple[BatchMessage, CollectiveRequest]] = deque()
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
            message = BatchMessage(*self._shape)
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
        message = BatchMessage(*self._shape)
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

    def _send(self, message: BatchMessage) -> None:
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
        self._end: BatchMessage | None = None
        self._message: BatchMessage | None = None
        self._request: CollectiveRequest | None = None
        self._post()

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        self._plan_digests[plan.chunk] = plan.digest

    def get(self, timeout_s: float) -> Batch | None:
        message = self._received(timeout_s)
        kind = message.kind
        if kind == BATCH:
            # The plan of a new chunk may arrive after the batch that the leader made from it.
            chunk = message.chunk
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
            if self._message.kind != BATCH:
                self._end = self._message
            else:
                self._post()

    def close(self, timeout_s: float | None = None) -> None:
        """Do nothing: this rank runs no reading thread."""

    def _post(self) -> None:
        self._message = BatchMessage(*self._shape)
        self._request = self._group.Ibcast(self._message.buffer)

    def _received(self, timeout_s: float) -> BatchMessage:
        """Return the message that arrived, the last one again after the end."""
        if self._end is not None:
            return self._end
        assert self._request is not None and self._message is not None  # Posted whenever the end is unknown.
        if not self._request.Test():
            time.sleep(timeout_s)
            if not self._request.Test():
                raise queue.Empty
        return self._message

    def _batch_of(self, message: BatchMessage) -> Batch:
        count = message.count
        tokens = message.tokens[:count].astype(np.int64)
        domain_ids = message.domain_ids[:count].copy()
        # Of what arrived here, not of what the leader sent.
        digests = batch_digests(tokens, domain_ids < 0, sequence_digest) if self._is_audited else None
        chunk = message.chunk
        return Batch(
            step=message.step,
            domain_ids=domain_ids,
            positions=np.arange(count) + self._slice.group * count,
            tokens=tokens,
            loss_mask=message.loss_mask[:count].copy(),
            document_ids=message.document_ids[:count].copy(),
            digests=digests,
            chunk=chunk,
            plan_digest=self._plan_digests[chunk],
        )
