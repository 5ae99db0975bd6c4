"""Reading in processes of their own, for data that one thread cannot keep up with.

`dataplane.workers` processes, each with a `BatchMaker`, get the steps of a chunk in turns, and their batches are put in order again:
what is served does not depend on how many there are. They are started anew, never forked (MPI forbids that), find modules where the
rank finds them, run nothing of the user's script, and end with their rank. Price: the tables of the index once per process, one
copy of every batch through a socket, and a document that two neighbouring pieces share is read twice.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import (
    Batch,
    BatchMaker,
    BatchSlice,
    BatchSource,
    steps_per_read,
    training_steps_of,
)
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError

__all__ = ["Workers", "open_batches"]

PIECES_AHEAD = 2
"""Pieces of a chunk that each process has been given and not handed back."""
NOT_FOR_WORKERS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
"""Slurm and terminals send them to every process of a job; the rank decides what they mean."""


def open_batches(source: Source, share: BatchSlice) -> BatchSource:
    """What makes this rank's batches: this process, or `dataplane.workers` others."""
    plane = source.config.dataplane
    if not plane.workers:
        return BatchMaker(source, share, plane.audit)
    return Workers(source, share, plane.workers)


class Workers:
    """`BatchSource`, made by several processes."""

    def __init__(self, source: Source, share: BatchSlice, count: int) -> None:
        self._source, self._share = source, share
        self._workers = [_start() for _ in range(count)]
        self._ready = False

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            DataError: a process has died.
        """
        self._send_source()
        steps, count = training_steps_of(self._source, plan, first_step), len(self._workers)
        size = min(steps_per_read(self._source, self._share), -(-len(steps) // count)) or 1
        pieces = [steps[i : i + size] for i in range(0, len(steps), size)]
        for number in range(count):
            self._put(number, plan)
        sent = 0
        for number in range(len(pieces)):
            for piece in pieces[sent : number + PIECES_AHEAD * count]:
                self._put(sent % count, piece)
                sent += 1
            batches, error = self._get(number % count)
            yield from batches
            if error is not None:
                raise error

    def close(self) -> None:
        """End the processes, whatever they do: they hold nothing that could be lost."""
        for process, pipe in self._workers:
            process.kill()
            process.wait()
            pipe.close()

    def _send_source(self) -> None:
        """Once, when the first batch is asked for, in the thread that asks."""
        if not self._ready:
            for number in range(len(self._workers)):
                self._put(number, (self._source, self._share))
            self._ready = True

    def _put(self, number: int, what: Any) -> None:
        """Send to a process that waits for it, or so little that it need not: both ends would wait to be read for ever."""
        try:
            self._workers[number][1].send(what)
        except OSError:
            raise self._died(number) from None

    def _get(self, number: int) -> tuple[list[Batch], Exception | None]:
        try:
            found: tuple[list[Batch], Exception | None] = self._workers[number][1].recv()
        except (EOFError, OSError):
            raise self._died(number) from None
        return found

    def _died(self, number: int) -> DataError:
        code = self._workers[number][0].wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DataError(
            f"Reading process {number} of {len(self._workers)} {how}; what it said is in the log.\n"
            "  Signal 9 mostly means too little memory: set dataplane.workers lower, or give the job more."
        )


def _start() -> tuple["subprocess.Popen[bytes]", Connection]:
    """Start a process that waits for signals it ignores to be ignored: none may end it before."""
    ours, theirs = Pipe()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
        places = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=places)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
    return process, ours


def _work(pipe: Connection) -> None:
    """A process's life: a source and a share, then plans, each with its pieces, until the rank hangs up."""
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_WORKERS)
    try:
        source, share = pipe.recv()
        maker = BatchMaker(source, share, source.config.dataplane.audit)
        plan: ChunkPlan = pipe.recv()
        while True:
            found = pipe.recv()
            if isinstance(found, ChunkPlan):
                plan = found
            else:
                pipe.send(_made(maker, plan, found))
    except (EOFError, OSError):
        return


def _made(maker: BatchMaker, plan: ChunkPlan, steps: range) -> tuple[list[Batch], Exception | None]:
    """The batches of some steps, and what went wrong after them."""
    batches: list[Batch] = []
    try:
        for batch in maker.batches_of(plan, steps):
            batches.append(batch)
    except Exception as error:
        return batches, error
    return batches, None


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
