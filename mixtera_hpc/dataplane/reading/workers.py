"""Reading in separate processes, for data that one thread cannot read fast enough.

`dataplane.workers` processes, each with a `BatchMaker`, take turns with ranges of a chunk's steps. Their batches are
put back in order, so that what is served does not depend on the number of processes. The processes are new
Python programs, never forks (MPI forbids them). They use the import path of the rank, do not run the user's script, and
end with their rank. Price: the tables of the index once per process, one copy of every batch through a socket, and a
document on the border of two step ranges is read twice.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, steps_per_read, training_steps_of
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice, BatchSource
from mixtera_hpc.dataplane.reading.sample_transform import load_transform
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError

__all__ = ["Workers", "open_batch_source"]

RANGES_AHEAD = 2
"""Step ranges that each process has been given and not returned."""
IGNORED_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
"""Slurm and terminals send these to every process of a job; the rank alone decides what they mean."""


def open_batch_source(source: Source, batch_slice: BatchSlice) -> BatchSource:
    """Return what makes this rank's batches: this process, or `dataplane.workers` others.

    Raises:
        ConfigError: `data.transform` cannot be imported.
    """
    plane = source.config.dataplane
    # Here, so that the rank names a wrong path, and not the end of a process.
    load_transform(source.config.data.transform)
    if not plane.workers:
        return BatchMaker(source, batch_slice, audit=plane.audit)
    return Workers(source, batch_slice, plane.workers)


class _Worker(NamedTuple):
    """A running process and our end of the pipe to it."""

    process: "subprocess.Popen[bytes]"
    pipe: Connection


class Workers:
    """A `BatchSource` of several processes."""

    def __init__(self, source: Source, batch_slice: BatchSlice, count: int) -> None:
        """Start `count` processes."""
        self._source = source
        self._slice = batch_slice
        self._workers = [_start_process() for _ in range(count)]
        self._has_source = False

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

        num_sent = 0
        for number in range(len(ranges)):
            # Keep every process `RANGES_AHEAD` ranges ahead of the one whose batches come next.
            for steps in ranges[num_sent : number + RANGES_AHEAD * count]:
                self._send(num_sent % count, steps)
                num_sent += 1
            batches, error = self._receive(number % count)
            yield from batches
            if error is not None:
                raise error

    def close(self) -> None:
        """Kill the processes in any state: they hold nothing that could be lost."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.pipe.close()

    def _step_ranges(self, plan: ChunkPlan, first_step: int) -> list[range]:
        """Cut the steps of a plan into ranges that are read together, at least one per process if there are enough."""
        steps = training_steps_of(self._source, plan, first_step)
        # Rounded up.
        steps_per_process = -(-len(steps) // len(self._workers))
        size = max(1, min(steps_per_read(self._source, self._slice), steps_per_process))
        return [steps[i : i + size] for i in range(0, len(steps), size)]

    def _send_source(self) -> None:
        """Send the source once, in the thread that asks for the first batch: pickling it must not delay the trainer."""
        # Worker processes take most of a second to start; sending here overlaps with what the rank does meanwhile.
        if not self._has_source:
            for number in range(len(self._workers)):
                self._send(number, (self._source, self._slice))
            self._has_source = True

    def _send(self, number: int, message: Any) -> None:
        """Send to a process that is waiting for the message, or a message that fits into the socket's buffer.

        Otherwise both ends could wait for ever for the other one to read.
        """
        try:
            self._workers[number].pipe.send(message)
        except OSError:
            raise self._death(number) from None

    def _receive(self, number: int) -> tuple[list[Batch], Exception | None]:
        """Return the batches of a step range, and the error after them, if any."""
        try:
            answer: tuple[list[Batch], Exception | None] = self._workers[number].pipe.recv()
        except (EOFError, OSError):
            raise self._death(number) from None
        return answer

    def _death(self, number: int) -> DataError:
        """Return the error that describes how a process ended."""
        code = self._workers[number].process.wait()
        reason = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DataError(
            f"Reading process {number} of {len(self._workers)} {reason}; its messages are in the log.\n"
            "  Signal 9 usually means too little memory: lower dataplane.workers, or request more memory for the job."
        )


def _start_process() -> _Worker:
    """Start a process in which the ignored signals are blocked until it ignores them: none may end it before."""
    ours, theirs = Pipe()
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        # -P: the current folder must not shadow modules.
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection) -> None:
    """Run a process: receive a source and a slice, then plans with their step ranges, until the rank closes."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The mask was inherited from the rank; blocked signals would stay pending for ever.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    try:
        source, batch_slice = pipe.recv()
        maker = BatchMaker(source, batch_slice, audit=source.config.dataplane.audit)
        plan: ChunkPlan = pipe.recv()
        while True:
            message = pipe.recv()
            if isinstance(message, ChunkPlan):
                plan = message
            else:
                _send_answer(pipe, _make_batches(maker, plan, message))
    # The rank has closed its end, or was killed.
    except (EOFError, OSError):
        return


def _send_answer(pipe: Connection, answer: tuple[list[Batch], Exception | None]) -> None:
    try:
        pipe.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        # Nothing was sent. Rows of files can be pickled; what a user's function returns may be anything.
        problem = DataError(
            f"data.transform returns what cannot be sent between processes: {error}.\n"
            "  Return arrays, numbers, texts, and dicts or lists of these; or set dataplane.workers=0."
        )
        pipe.send(([], problem))


def _make_batches(maker: BatchMaker, plan: ChunkPlan, steps: range) -> tuple[list[Batch], Exception | None]:
    """Return the batches of some steps, and the error that ended them early, if any."""
    batches: list[Batch] = []
    try:
        for batch in maker.batches_of(plan, steps):
            batches.append(batch)
    except Exception as error:
        # The error travels after the batches before it, so that it is raised at its step.
        return batches, error
    return batches, None


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
