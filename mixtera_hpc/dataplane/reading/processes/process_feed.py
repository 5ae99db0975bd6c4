"""Batches of tokens from reading processes, taken in the trainer's thread.

The content of batches is in shared memory, so a message has a few kilobytes. A thread that received them would need the
interpreter lock for each, and each side would wait for the other one for up to 5 ms when the trainer runs Python code.
Here, no thread of the rank works on batches between two calls of the trainer. Price: 0.1 ms of the trainer's thread for
each answer, which has the batches of several steps.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.processes.workers import Workers

__all__ = ["ProcessFeed"]


class ProcessFeed:
    """A `BatchFeed` of reading processes. Not thread-safe."""

    def __init__(self, workers: Workers, prefetch_batches: int) -> None:
        """Take batches from `workers`; `advance` holds up to `prefetch_batches` and those of one more answer."""
        self._workers = workers
        self.places = workers.places
        self._prefetch_batches = prefetch_batches
        self._plans: deque[tuple[ChunkPlan, int]] = deque()
        """Plans that were not sent, each with its first step."""
        self._ready: deque[Batch] = deque()
        self._has_ended = False
        """True if no batch follows after `_ready`."""
        self._error: BaseException | None = None
        """The error that ended the reading."""
        self._is_last_plan = False
        self._starter: threading.Thread | None = None
        """The thread that sends the source and the first plan, which the processes take when they have started."""

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Take a plan; its steps before `first_step` are skipped."""
        if self._starter is None:
            self._is_last_plan = plan.last
            self._starter = threading.Thread(target=self._begin, args=(plan, first_step), name="starter", daemon=True)
            self._starter.start()
            return
        self._plans.append((plan, first_step))

    def get(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None in every call after the end of the data.

        Raises:
            queue.Empty: no batch is ready within `timeout_s`.
            BaseException: the error or interrupt that ended the reading, in every call from then on.
        """
        if not self._ready:
            self._take(timeout_s)
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            raise self._error
        if not self._has_ended:
            raise queue.Empty
        return None

    @property
    def num_ready(self) -> int:
        """Batches that `get` returns without waiting. The end of the data and an error count as one."""
        return len(self._ready) + int(self._has_ended)

    def advance(self) -> None:
        """Take what has arrived, and pass on a plan that the processes wait for; does not block."""
        if len(self._ready) < self._prefetch_batches:
            self._take(timeout_s=0.0)

    def finish(self) -> None:
        """Do nothing: no other rank waits for these batches."""

    def close(self, timeout_s: float | None = None) -> None:
        """End the processes; wait up to `timeout_s` for each, or without limit."""
        self._workers.kill()
        if self._starter is not None:
            # A pipe that a thread writes to must stay open.
            self._starter.join(timeout_s)
            if self._starter.is_alive():
                return
        self._workers.close(timeout_s)

    def _take(self, timeout_s: float) -> None:
        """Take the next answer if it comes within `timeout_s`."""
        if self._has_ended or not self._has_started(timeout_s):
            return
        self._send_plan()
        if self._workers.is_idle:
            time.sleep(timeout_s)
        elif self._workers.can_receive(timeout_s):
            # The batches before an error are served.
            with self._ends_with_error():
                for batch in self._workers.receive():
                    self._ready.append(batch)
            self._send_plan()

    def _has_started(self, timeout_s: float) -> bool:
        """Return True if the processes have the first plan; wait for it up to `timeout_s`."""
        if self._starter is None:
            time.sleep(timeout_s)
            return False
        self._starter.join(timeout_s)
        return not self._starter.is_alive()

    def _send_plan(self) -> None:
        """Send the next plan if the processes are idle: only then do they read a message of any size."""
        while self._workers.is_idle and not self._has_ended:
            if self._is_last_plan:
                self._has_ended = True
            elif self._plans:
                plan, first_step = self._plans.popleft()
                self._is_last_plan = plan.last
                self._begin(plan, first_step)
            else:
                return

    def _begin(self, plan: ChunkPlan, first_step: int) -> None:
        with self._ends_with_error():
            self._workers.begin(plan, first_step)

    @contextlib.contextmanager
    def _ends_with_error(self) -> Iterator[None]:
        """End the reading if there is an error, which `get` raises after the batches before it.

        An interrupt (KeyboardInterrupt) ends it, too: half a message may be in a pipe, and batches may be lost.
        """
        try:
            yield
        except BaseException as error:
            self._error = error
            self._has_ended = True
            if not isinstance(error, Exception):
                raise
