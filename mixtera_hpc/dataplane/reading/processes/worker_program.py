"""The program of a reading process: it makes batches with a `BatchMaker` when its rank asks for them."""

import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.processes.batch_memory import BatchMemory, TokenArrays
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import DataError, MixteraError

__all__ = ["IGNORED_SIGNALS", "RangeAnswer", "RangeRequest"]

RANK_POLL_S = 1.0
SAMPLES_PER_PICKLE = 32
"""Samples that are pickled together: no message is so large that copying it keeps the trainer's thread from running."""
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of glibc's `mallopt`."""
NO_TOKENS = TokenArrays(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.bool_))
"""Placeholders for the arrays of a batch that is in shared memory."""
IGNORED_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
"""Slurm and terminals send these to every process of a job; the rank alone decides what they mean."""

# Plain tuples: a class of this module would have another module name in the process, whose program this file is.
RangeRequest = tuple[range, dict[int, int]]
"""Steps whose batches are requested, and step → slot of the shared memory for its batch."""
RangeAnswer = tuple[list[Batch], Exception | None]
"""The batches of a step range, and the error after them, if any. Arrays in shared memory are left out, and so are
samples. They are sent after the answer: for each batch the number of its pickles, then the pickles."""


def _serve(rank_pid: int, pipe: Connection, place_fd: int, memory_fd: int = -1) -> None:
    """Run a process: receive a source and a slice, then plans with their step ranges, until the rank closes."""
    if sys.__stderr__ is not None:
        # A fatal signal, such as SIGBUS for a file that was truncated, leaves the stack in the log.
        faulthandler.enable(sys.__stderr__)
    _ignore_signals()
    # The mask was inherited from the rank; blocked signals would stay pending for ever.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    threading.Thread(target=_end_with_rank, args=(rank_pid,), daemon=True).start()
    _keep_freed_memory()
    try:
        messages = [pipe.recv_bytes(), pipe.recv_bytes()]
    # The rank has closed its end, or was killed.
    except (EOFError, OSError):
        return

    # An error of another type, for example too little memory, ends the process with a message in the log.
    failure: MixteraError | None = None
    try:
        (source, batch_slice), shape = map(pickle.loads, messages)  # Sent by the rank.
        memory = BatchMemory(memory_fd, shape) if shape is not None else None
        maker = BatchMaker(source, batch_slice, audit=source.config.dataplane.audit)
        maker.write_place(ReadPlace.of_memory(place_fd))
    except MixteraError as error:
        failure = error
    with contextlib.suppress(EOFError, OSError):
        if failure is None:
            _answer_requests(pipe, maker, memory)
        else:
            _refuse_requests(pipe, failure)


def _answer_requests(pipe: Connection, maker: BatchMaker, memory: BatchMemory | None) -> None:
    """Send the batches that the rank requests, until it closes its end."""
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


def _refuse_requests(pipe: Connection, error: MixteraError) -> None:
    """Answer every request with an error, until the rank closes its end."""
    while True:
        if not isinstance(pipe.recv(), ChunkPlan):
            pipe.send(([], error))


def _end_with_rank(rank_pid: int) -> None:
    """Exit when the rank has ended. The closed pipe would show it, but a read that hangs never returns to the pipe."""
    while os.getppid() == rank_pid:
        time.sleep(RANK_POLL_S)
    os._exit(1)


def _ignore_signals() -> None:
    """Ignore `IGNORED_SIGNALS`. A user's function may still end the processes that it starts with SIGTERM.

    `SIG_IGN` is inherited by programs and forks. A handler is not inherited by programs, and forks remove it.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # A read in a library continues after the signal. It would fail with EINTR otherwise.
    signal.siginterrupt(signal.SIGTERM, False)
    os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))


def _keep_freed_memory() -> None:
    """Make malloc use freed memory again: the kernel clears every page that it gets anew, which costs more than use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Only glibc has it.
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _make_batches(
    maker: BatchMaker, plan: ChunkPlan, request: RangeRequest, memory: BatchMemory | None
) -> tuple[RangeAnswer, list[list[bytes]]]:
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
    """Return the samples of a batch, `SAMPLES_PER_PICKLE` in every pickle.

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
