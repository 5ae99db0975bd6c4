"""Reading in separate processes, which leave the interpreter of the rank to the trainer.

`dataplane.workers` processes, each with a `BatchMaker`, take turns with ranges of a chunk's steps. Their batches are
put back in order, so that what is served does not depend on the number of processes. The processes are new
Python programs, never forks (MPI forbids them). They use the import path of the rank, do not run the user's script, and
end with their rank. Price: the tables of the index once more per node, 13 bytes of shared memory per token of a batch,
and a document on the border of two step ranges is read twice. Samples are copied through a socket.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from mixtera_hpc.config.check import WORKERS_PER_CORE
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, items_per_read, steps_per_read
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice, PickledSamples
from mixtera_hpc.dataplane.reading.processes.batch_memory import BatchMemory, MemoryShape
from mixtera_hpc.dataplane.reading.processes.process_choice import may_use_processes
from mixtera_hpc.dataplane.reading.processes.worker_program import IGNORED_SIGNALS, RangeAnswer, RangeRequest
from mixtera_hpc.dataplane.reading.sample_transform import load_transform
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import is_last_chunk, training_steps_of
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import ConfigError, DataError

__all__ = ["Workers", "default_workers", "open_batch_source"]

PROGRAM = "mixtera_hpc.dataplane.reading.processes.worker_program"
RANGES_AHEAD = 2
"""Step ranges that each process has been given and not returned."""
MAX_TOKENS_PER_REQUEST = 1 << 20
"""Largest size of a range of several steps, whose batches are in shared memory all at the same time."""
SPARE_SLOTS = 4
"""Batches that a trainer may hold at a time before further ones are copied."""
CURES: dict[int, str] = {
    signal.SIGKILL: "Signal 9 usually means too little memory: lower dataplane.workers, or request more memory for the "
    "job.",
    signal.SIGBUS: "A data file was truncated while it was read, or cannot be read: run mixtera-hpc index verify.",
}
"""Signal → what to do if it ended a process."""
CURE_OF_ERRORS = (
    "If it was refused memory, files or threads, raise the limits of the job (ulimit -a); or set dataplane.workers=0, "
    "with which a thread of the rank reads."
)


def open_batch_source(source: Source, batch_slice: BatchSlice, ranks_of_node: int) -> "BatchMaker | Workers":
    """Return what makes this rank's batches: this process, or `dataplane.workers` others.

    Args:
        ranks_of_node: number of ranks that share the cores of this one's node.

    Raises:
        ConfigError: `data.transform` cannot be imported, or there are far more processes than cores.
    """
    plane = source.config.dataplane
    # Here, so that the rank names a wrong path, and not the end of a process.
    load_transform(source.config.data.transform)
    count = plane.workers
    if count is None:
        may = may_use_processes(source.config)
        count = default_workers(ranks_of_node) if may else 0
    if count == 0:
        return BatchMaker(source, batch_slice, audit=plane.audit)
    cores = _own_cores() or len(os.sched_getaffinity(0))
    if count > WORKERS_PER_CORE * cores:
        raise ConfigError(
            f"dataplane.workers is {count}, more than {WORKERS_PER_CORE} × the {cores} cores that this rank may use. "
            "More processes than cores slow each other down. Lower it."
        )
    return Workers(source, batch_slice, count)


def default_workers(ranks_of_node: int) -> int:
    """Return 1 if this rank has a core for a reading process beside that of the trainer, else 0."""
    # Ranks may be bound to cores of their own, or share all that this one may use.
    own_cores = _own_cores()
    shared_cores = len(os.sched_getaffinity(0)) // ranks_of_node
    return int(max(own_cores, shared_cores) >= 2)


def _own_cores() -> int:
    """Return the cores that Slurm gave to each task; 0 if it did not say."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or 0)


class _Worker(NamedTuple):
    """A running process and our end of the pipe to it."""

    process: "subprocess.Popen[bytes]"
    pipe: Connection
    poll: "select.poll"
    """A poll object that knows whether the process has sent something; `Connection.poll` takes ten times as long."""
    place: ReadPlace
    memory: BatchMemory | None
    """For its batches; None if these hold samples."""


class Workers:
    """A `BatchSource` of several processes."""

    def __init__(self, source: Source, batch_slice: BatchSlice, count: int) -> None:
        """Start `count` processes.

        Raises:
            ConfigError: the system refuses a process, or the memory for its batches.
        """
        self._source = source
        self._slice = batch_slice
        self._items_per_read = items_per_read(source)
        if source.layout.in_tokens:
            self._items_per_read = min(self._items_per_read, MAX_TOKENS_PER_REQUEST)
        size = self._range_size(count, source.config.dataplane.chunk_steps)
        self._shape = _memory_shape(source, batch_slice, size) if source.layout.in_tokens else None
        descriptors = source.memory.descriptors()
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(_start_process(self._shape, descriptors))
        except OSError as error:
            self.close()
            raise ConfigError(
                f"Reading process {len(self._workers)} of {count} cannot be started: {error.strerror}.\n"
                f"  {CURE_OF_ERRORS}"
            ) from None
        self._has_source = False
        self._ranges: list[range] = []
        """Step ranges of the plan in progress."""
        self._requests: list[RangeRequest] = []
        """Those of `_ranges` that were sent."""
        self._num_received = 0
        """Number of answers to `_requests` that were received."""
        self.next_is_made = False
        """See `BatchSource`."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """The place of every process."""
        return [worker.place for worker in self._workers]

    @property
    def is_idle(self) -> bool:
        """True if the batches of all plans were received."""
        return self._num_received == len(self._ranges)

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            DataError: a process has died.
        """
        self.begin(plan, first_step)
        while not self.is_idle:
            yield from self.receive()

    def begin(self, plan: ChunkPlan, first_step: int) -> None:
        """Request the batches of a plan, from training step `first_step` on; the processes are idle.

        Raises:
            DataError: a process has died.
        """
        self._send_source()
        self._ranges = self._step_ranges(plan, first_step)
        self._requests = []
        self._num_received = 0
        for number in range(len(self._workers)):
            self._send(number, plan)
        self._request_ahead()

    def can_receive(self, timeout_s: float) -> bool:
        """Return True if a process answers within `timeout_s`, so that `receive` does not wait for a read."""
        return bool(self._workers[self._oldest].poll.poll(timeout_s * 1e3))

    def receive(self) -> Iterator[Batch]:
        """Yield the batches of the oldest request; then raise the error that ended them, if any."""
        number = self._oldest
        answer: RangeAnswer = self._receive(number)
        batches, error = answer
        _, slots = self._requests[self._num_received]
        self._num_received += 1
        self._request_ahead()
        for remaining, batch in zip(reversed(range(len(batches))), batches, strict=True):
            self.next_is_made = remaining > 0
            yield self._completed(batch, slots.pop(batch.step, None), number)
        if error is not None:
            self._give_back(slots, number)
            raise error

    def kill(self) -> None:
        """Kill the processes in any state: they hold nothing that could be lost."""
        for worker in self._workers:
            worker.process.kill()

    def close(self, timeout_s: float | None = None) -> None:
        """Kill the processes; wait up to `timeout_s` for the end of each, or without limit."""
        self.kill()
        for worker in self._workers:
            # A process inside a read that a broken file system never answers ends later.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout_s)
            worker.pipe.close()

    @property
    def _oldest(self) -> int:
        """Number of the process that answers next."""
        return self._num_received % len(self._workers)

    def _request_ahead(self) -> None:
        """Keep every process `RANGES_AHEAD` step ranges ahead of the batches that come next."""
        count = len(self._workers)
        for steps in self._ranges[len(self._requests) : self._num_received + RANGES_AHEAD * count]:
            self._requests.append(self._request(len(self._requests) % count, steps))

    def _request(self, number: int, steps: range) -> RangeRequest:
        """Ask a process for the batches of some steps, with slots for as many of them as are free."""
        memory = self._workers[number].memory
        slots = memory.take(len(steps)) if memory is not None else []
        request = steps, dict(zip(steps, slots, strict=False))
        self._send(number, request)
        return request

    def _completed(self, batch: Batch, slot: int | None, number: int) -> Batch:
        """Return a batch with the arrays or samples that do not travel inside it."""
        memory = self._workers[number].memory
        if memory is None:
            num_pickles: int = self._receive(number)
            return replace(batch, payloads=PickledSamples(self._receive_bytes(number) for _ in range(num_pickles)))
        return batch if slot is None else replace(batch, **memory.lend(slot).rows(len(batch.positions))._asdict())

    def _give_back(self, slots: dict[int, int], number: int) -> None:
        """Free the slots of steps without a batch."""
        memory = self._workers[number].memory
        if memory is not None:
            for slot in slots.values():
                memory.give_back(slot)

    def _step_ranges(self, plan: ChunkPlan, first_step: int) -> list[range]:
        """Cut the steps of a plan into ranges that are read together, at least one per process if there are enough."""
        steps = training_steps_of(self._source, plan, first_step)
        size = self._range_size(len(self._workers), len(steps), plan)
        ranges = [steps[i : i + size] for i in range(0, len(steps), size)]
        if is_last_chunk(self._source, plan):
            # Processes without a step compare the files that they have read before the last batches are served.
            ranges = [range(0)] * (len(self._workers) - len(ranges)) + ranges
        return ranges

    def _range_size(self, num_processes: int, num_steps: int, plan: ChunkPlan | None = None) -> int:
        """Return how many of `num_steps` steps of `plan`, or of the first chunk, one request asks for."""
        # Rounded up.
        steps_per_process = -(-num_steps // num_processes)
        together = steps_per_read(self._source, self._slice, self._items_per_read, plan)
        return max(1, min(together, steps_per_process))

    def _send_source(self) -> None:
        """Send the source once. The trainer's thread must not do it, because a process first has to start."""
        # Worker processes take most of a second to start; sending here overlaps with what the rank does meanwhile.
        if not self._has_source:
            for number in range(len(self._workers)):
                self._send(number, (self._source, self._slice))
                self._send(number, self._shape)
            self._has_source = True

    def _send(self, number: int, message: Any) -> None:
        """Send to a process that is waiting for the message, or a message that fits into the socket's buffer.

        Otherwise both ends could wait for ever for the other one to read.
        """
        try:
            self._workers[number].pipe.send(message)
        except OSError:
            raise self._death(number) from None

    def _receive(self, number: int) -> Any:
        """Return the next message of a process: the answer to its oldest request, or samples."""
        try:
            return self._workers[number].pipe.recv()
        except (EOFError, OSError):
            raise self._death(number) from None

    def _receive_bytes(self, number: int) -> bytes:
        """Return the next message of a process as it is."""
        try:
            return self._workers[number].pipe.recv_bytes()
        except (EOFError, OSError):
            raise self._death(number) from None

    def _death(self, number: int) -> DataError:
        """Return the error that describes how a process ended."""
        code = self._workers[number].process.wait()
        reason = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        cure = CURES.get(-code, CURE_OF_ERRORS)
        return DataError(
            f"Reading process {number} of {len(self._workers)} {reason}; its messages are in the log.\n  {cure}"
        )


def _memory_shape(source: Source, batch_slice: BatchSlice, range_size: int) -> MemoryShape:
    """Return the size of the memory of each process: enough for the batches that are on their way to the trainer.

    Args:
        source: the data.
        batch_slice: the part of each batch.
        range_size: steps in one request.
    """
    # The oldest request is being handed out while the others wait.
    num_slots = (RANGES_AHEAD + 1) * range_size + source.config.dataplane.prefetch_batches + SPARE_SLOTS
    largest = batch_slice.size_of(source.planner.batch_schedule.largest)
    return MemoryShape(num_slots=num_slots, batch_size=largest, length=source.grid.length)


def _start_process(shape: MemoryShape | None, inherited: Sequence[int]) -> _Worker:
    """Start a process in which the ignored signals are blocked until it ignores them: none may end it before.

    Args:
        shape: the memory for its batches; None if these hold samples.
        inherited: descriptors that the source refers to.

    Raises:
        OSError: the system refuses the process or its memory.
    """
    ours, theirs = Pipe()
    fds = [theirs.fileno()]
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        fds.append(ReadPlace.create())
        if shape is not None:
            fds.append(BatchMemory.create(shape))
        # -P: the current folder must not shadow modules.
        command = [sys.executable, "-P", "-m", PROGRAM, str(os.getpid()), *map(str, fds)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        process = subprocess.Popen(command, pass_fds=[*fds, *inherited], stdin=subprocess.DEVNULL, env=environment)
        place = ReadPlace.of_memory(fds[1])
        memory = BatchMemory(fds[2], shape) if shape is not None else None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        theirs.close()
        for fd in fds[1:]:
            os.close(fd)
    arrivals = select.poll()
    arrivals.register(ours.fileno(), select.POLLIN)
    return _Worker(process, ours, arrivals, place, memory)
