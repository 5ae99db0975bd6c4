"""Batches made ahead of time, in a background thread.

The thread expands plans, reads, decompresses, tokenizes and packs. It never calls MPI. It stays at most
`prefetch_batches` ahead of the trainer. An error in it is raised in the main thread, at the step it belongs to.

If the trainer waits for a batch, the thread hands it over and pauses until the trainer has taken it. Otherwise the
thread would keep the interpreter's lock for up to 5 ms, and make further batches that push this one out of the cache.
Batches that were made together are handed over together: a turn of the other thread costs about 10 µs.
"""

import queue
import threading
from collections import deque
from dataclasses import dataclass

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSource, with_samples

__all__ = ["Prefetcher"]

HAND_OVER_S = 0.01
"""Longest pause of the thread, in seconds, after it has made a batch that the trainer waits for."""


@dataclass(frozen=True, slots=True)
class _QueuedPlan:
    plan: ChunkPlan
    first_step: int


class _EndOfData:
    """Follows the last batch in the queue."""


class Prefetcher:
    """A daemon thread that makes batches, between a queue of plans and a queue of batches. No thread polls."""

    def __init__(self, maker: BatchSource, prefetch_batches: int) -> None:
        """Start the thread; it prepares at most `prefetch_batches` batches, and one that waits for room."""
        self._maker = maker
        self.places = maker.places
        """Places where the thread, or its processes, read."""
        self._prefetch_batches = prefetch_batches
        self._plans: queue.SimpleQueue[_QueuedPlan | None] = queue.SimpleQueue()
        self._ready: deque[Batch | _EndOfData | BaseException] = deque()
        """Only the thread adds to it, and only the trainer's thread takes from it."""
        lock = threading.Lock()
        self._has_batch = threading.Condition(lock)
        self._has_room = threading.Condition(lock)
        self._end: _EndOfData | BaseException | None = None
        """End or error that came instead of another batch; `get` repeats it."""
        self._is_stopping = False
        self._is_awaited = False
        """True while the trainer's thread waits for a batch."""
        self._is_handing_over = False
        """True while the thread pauses until the queue is empty."""
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Queue a plan; its steps before `first_step` are skipped."""
        self._plans.put(_QueuedPlan(plan, first_step))

    def get(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None after the end of the data, however often one asks.

        Raises:
            queue.Empty: no batch is ready within `timeout_s`.
            Exception: the error that ended the thread, in every call from then on.
        """
        # After the end the queue stays empty: waiting for it would be for ever.
        item = self._take(timeout_s) if self._end is None else self._end
        if isinstance(item, Batch):
            return with_samples(item)
        self._end = item
        if isinstance(item, BaseException):
            raise item
        return None

    @property
    def num_ready(self) -> int:
        """Batches that `get` returns without waiting. The end of the data and an error count as one."""
        return len(self._ready) + int(self._end is not None)

    def advance(self) -> None:
        """Do nothing: no other rank waits for these batches."""

    def finish(self) -> None:
        """Do nothing: no other rank waits for these batches."""

    def close(self, timeout_s: float | None = None) -> None:
        """Stop the thread and drop the batches that it has prepared.

        Args:
            timeout_s: how long to wait for a read in progress. After that the thread frees its files by itself, once
                the read returns. None waits without limit, so that the caller may free what the thread reads from.
        """
        # Wakes the thread if it waits for a plan, or for room.
        self._plans.put(None)
        with self._has_room:
            self._is_stopping = True
            self._has_room.notify()
        self._thread.join(timeout=timeout_s)

    def _take(self, timeout_s: float) -> Batch | _EndOfData | BaseException:
        """Take the oldest item, and let the thread go on if it waits for room.

        Raises:
            queue.Empty: there is none within `timeout_s`.
        """
        with self._has_batch:
            if not self._ready and not self._await_batch(timeout_s):
                raise queue.Empty
            item = self._ready.popleft()
            # A thread that hands batches over pauses until all of them are taken. To wake it earlier only costs a turn.
            if not self._is_handing_over or not self._ready:
                self._has_room.notify()
            return item

    def _await_batch(self, timeout_s: float) -> bool:
        """Wait for a batch; the lock is held. Return False if none has come within `timeout_s`."""
        try:
            self._is_awaited = True
            return self._has_batch.wait_for(lambda: len(self._ready) > 0, timeout_s)
        finally:
            self._is_awaited = False

    def _run(self) -> None:
        try:
            while (work := self._plans.get()) is not None:
                for batch in self._maker.batches(work.plan, work.first_step):
                    if not self._put(batch):
                        return
                    # Its memory is written again for the next batches, once the trainer has freed it.
                    del batch
                # No plan follows the last one.
                if work.plan.last:
                    self._put(_EndOfData())
                    return
        # Anything, so that the main thread does not wait for batches that will never come.
        except BaseException as error:
            self._put(error)
        finally:
            self._maker.close()

    def _put(self, item: Batch | _EndOfData | BaseException) -> bool:
        """Wait for room in the queue; return False when `close` was called meanwhile."""
        with self._has_room:
            self._has_room.wait_for(lambda: self._is_stopping or len(self._ready) < self._prefetch_batches)
            if self._is_stopping:
                return False
            self._ready.append(item)
            is_followed = self._maker.next_is_made and isinstance(item, Batch)
            if is_followed and len(self._ready) < self._prefetch_batches:
                return True
            self._has_batch.notify()
            if self._is_awaited and not is_followed:
                self._hand_over()
        return True

    def _hand_over(self) -> None:
        """Give up the interpreter's lock until the trainer's thread has taken all batches; the lock is held."""
        self._is_handing_over = True
        self._has_room.wait_for(lambda: self._is_stopping or not self._ready, HAND_OVER_S)
        self._is_handing_over = False
