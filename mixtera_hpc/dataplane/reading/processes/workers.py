"""Reading in separate processes, which leave the interpreter of the rank to the trainer.

`dataplane.workers` processes, each with a `BatchMaker`, take turns with ranges of a chunk's steps. Their batches are
put back in order, so that what is served does not depend on the number of processes. The processes are new
Python programs, never forks (MPI forbids them). They use the import path of the rank, do not run the user's script, and
end with their rank. Price: the tables of the index once more per node, 13 bytes of shared memory per token of a batch,
and a document on the border of two step ranges is read twice. Samples are copied through a socket.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from mixtera_hpc.config.check import WORKERS_PER_CORE
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, steps_per_read, training_steps_of
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice, BatchSource, PickledSamples
from mixtera_hpc.dataplane.reading.processes.batch_memory import BatchMemory, MemoryShape, TokenArrays
from mixtera_hpc.dataplane.reading.processes.process_choice import may_use_processes
from mixtera_hpc.dataplane.reading.sample_transform import load_transform
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import ConfigError, DataError

__all__ = ["Workers", "default_workers", "open_batch_source"]

RANGES_AHEAD = 2
"""Step ranges that each process has been given and not returned."""
RANK_POLL_S = 1.0
SPARE_SLOTS = 4
"""Batches that a trainer may hold at a time before further ones are copied."""
SAMPLES_PER_PICKLE = 32
"""Samples that are pickled together: no message is so large that copying it keeps the trainer's thread from running."""
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of glibc's `mallopt`."""
NO_TOKENS = TokenArrays(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.bool_))
"""Stand for the arrays of a batch that is in shared memory."""
IGNORED_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
"""Slurm and terminals send these to every process of a job; the rank alone decides what they mean."""


def open_batch_source(source: Source, batch_slice: BatchSlice, ranks_of_node: int) -> BatchSource:
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
    place: ReadPlace
    memory: BatchMemory | None
    """For its batches; None if these hold samples."""


# Plain tuples: the class of a message would have another module name in a process, where this file is the program.
_RangeRequest = tuple[range, dict[int, int]]
"""Steps whose batches are ordered, and step → slot of the shared memory for its batch."""
_RangeAnswer = tuple[list[Batch], Exception | None]
"""The batches of a step range, and the error after them, if any. Arrays in shared memory are left out, and so are
samples: for each batch follow the number of its pickles, and these, with some samples each."""


class Workers:
    """A `BatchSource` of several processes."""

    def __init__(self, source: Source, batch_slice: BatchSlice, count: int) -> None:
        """Start `count` processes."""
        self._source = source
        self._slice = batch_slice
        self._shape = _memory_shape(source, batch_slice, count) if source.layout.in_tokens else None
        shared = (source.table_memory, source.block_memory, source.shard_stamps)
        memories = [memory.fd for memory in shared if memory is not None]
        self._workers = [_start_process(self._shape, memories) for _ in range(count)]
        self._has_source = False

    @property
    def places(self) -> Sequence[ReadPlace]:
        """The place of every process."""
        return [worker.place for worker in self._workers]

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            DataError: a process has died.
        """
        self._send_source()
        count = len(self._workers)
        ranges = self._step_ranges(plan, first_step)
        for number in range(count):
            self._send(number, plan)

        requests: list[_RangeRequest] = []
        for number in range(len(ranges)):
            # Keep every process `RANGES_AHEAD` ranges ahead of the one whose batches come next.
            for steps in ranges[len(requests) : number + RANGES_AHEAD * count]:
                requests.append(self._request(len(requests) % count, steps))
            answer: _RangeAnswer = self._receive(number % count)
            batches, error = answer
            _, slots = requests[number]
            for batch in batches:
                yield self._completed(batch, slots.pop(batch.step, None), number % count)
            if error is not None:
                self._give_back(slots, number % count)
                raise error

    def close(self) -> None:
        """Kill the processes in any state: they hold nothing that could be lost."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.pipe.close()

    def _request(self, number: int, steps: range) -> _RangeRequest:
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
        size = _range_size(self._source, self._slice, len(self._workers), len(steps), plan)
        return [steps[i : i + size] for i in range(0, len(steps), size)]

    def _send_source(self) -> None:
        """Send the source once, in the thread that asks for the first batch: pickling it must not delay the trainer."""
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
        return DataError(
            f"Reading process {number} of {len(self._workers)} {reason}; its messages are in the log.\n"
            "  Signal 9 usually means too little memory: lower dataplane.workers, or request more memory for the job."
        )


def _range_size(
    source: Source, batch_slice: BatchSlice, num_processes: int, num_steps: int, plan: ChunkPlan | None = None
) -> int:
    """Return how many of `num_steps` steps of `plan`, or of the first chunk, one request asks for."""
    # Rounded up.
    steps_per_process = -(-num_steps // num_processes)
    return max(1, min(steps_per_read(source, batch_slice, plan), steps_per_process))


def _memory_shape(source: Source, batch_slice: BatchSlice, num_processes: int) -> MemoryShape:
    """Return the size of the memory of each process: enough for the batches that are on their way to the trainer."""
    plane = source.config.dataplane
    size = _range_size(source, batch_slice, num_processes, plane.chunk_steps)
    # The oldest request is being handed out while the others wait.
    num_slots = (RANGES_AHEAD + 1) * size + plane.prefetch_batches + SPARE_SLOTS
    largest = batch_slice.size_of(source.planner.batch_schedule.largest)
    return MemoryShape(num_slots=num_slots, batch_size=largest, length=source.grid.length)


def _start_process(shape: MemoryShape | None, inherited: Sequence[int]) -> _Worker:
    """Start a process in which the ignored signals are blocked until it ignores them: none may end it before.

    Args:
        shape: the memory for its batches; None if these hold samples.
        inherited: descriptors that the source refers to.
    """
    ours, theirs = Pipe()
    fds = [theirs.fileno(), ReadPlace.create()]
    if shape is not None:
        fds.append(BatchMemory.create(shape))
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        # -P: the current folder must not shadow modules.
        command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), *map(str, fds)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        process = subprocess.Popen(command, pass_fds=[*fds, *inherited], stdin=subprocess.DEVNULL, env=environment)
        place = ReadPlace.of_memory(fds[1])
        memory = BatchMemory(fds[2], shape) if shape is not None else None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        theirs.close()
        for fd in fds[1:]:
            os.close(fd)
    return _Worker(process, ours, place, memory)


def _serve(rank_pid: int, pipe: Connection, place_fd: int, memory_fd: int = -1) -> None:
    """Run a process: receive a source and a slice, then plans with their step ranges, until the rank closes."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The mask was inherited from the rank; blocked signals would stay pending for ever.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    threading.Thread(target=_end_with_rank, args=(rank_pid,), daemon=True).start()
    _keep_freed_memory()
    try:
        source, batch_slice = pipe.recv()
        shape: MemoryShape | None = pipe.recv()
        memory = BatchMemory(memory_fd, shape) if shape is not None else None
        maker = BatchMaker(source, batch_slice, audit=source.config.dataplane.audit)
        maker.write_place(ReadPlace.of_memory(place_fd))
        plan: ChunkPlan = pipe.recv()
        while True:
            message = pipe.recv()
            if isinstance(message, ChunkPlan):
                plan = message
            else:
                answer, samples = _make_batches(maker, plan, message, memory)
                pipe.send(answer)
                for of_batch in samples:
                    pipe.send(len(of_batch))
                    for pickled in of_batch:
                        pipe.send_bytes(pickled)
    # The rank has closed its end, or was killed.
    except (EOFError, OSError):
        return


def _end_with_rank(rank_pid: int) -> None:
    """Exit when the rank has ended: a read that hangs never comes back to the pipe, which would say so."""
    while os.getppid() == rank_pid:
        time.sleep(RANK_POLL_S)
    os._exit(1)


def _keep_freed_memory() -> None:
    """Make malloc use freed memory again: the kernel clears every page that it gets anew, which costs more than use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Only glibc has it.
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _make_batches(
    maker: BatchMaker, plan: ChunkPlan, request: _RangeRequest, memory: BatchMemory | None
) -> tuple[_RangeAnswer, list[list[bytes]]]:
    """Return the batches of some steps, with the error that ended them early, if any; and the samples of each batch."""
    steps, slots = request
    if memory is not None:
        maker.shared_arrays = {step: memory.arrays(slot) for step, slot in slots.items()}
    batches: list[Batch] = []
    samples: list[list[bytes]] = []
    try:
        for batch in maker.batches_of(plan, steps):
            if batch.payloads is not None:
                samples.append(_pickled(batch.payloads))
            shared = maker.shared_arrays.get(batch.step)
            if shared is not None:
                shared.store(batch.tokens, batch.document_ids, batch.loss_mask)
                batch = replace(batch, **NO_TOKENS._asdict())
            batches.append(replace(batch, payloads=None))
    except Exception as error:
        # The error travels after the batches before it, so that it is raised at its step.
        return (batches, error), samples
    return (batches, None), samples


def _pickled(samples: list[Any]) -> list[bytes]:
    """Return the samples of a batch, some in every pickle.

    Raises:
        DataError: a user's function returned what cannot be pickled.
    """
    parts = [samples[i : i + SAMPLES_PER_PICKLE] for i in range(0, len(samples), SAMPLES_PER_PICKLE)]
    try:
        return [pickle.dumps(part, pickle.HIGHEST_PROTOCOL) for part in parts]
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise DataError(
            f"data.transform returns what cannot be sent between processes: {error}.\n"
            "  Return arrays, numbers, texts, and dicts or lists of these; or set dataplane.workers=0."
        ) from None


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Connection(int(sys.argv[2])), *map(int, sys.argv[3:]))
