"""Scan units with all ranks in parallel: each takes the next units when it is free, so none waits for a slow one.

Units are handed out from large to small, small ones in batches, through one shared counter: one fetch-and-add per
batch, no messages, no master. Workers are threads. The main thread of a rank claims units, and it alone calls MPI. On
rank 0 it wakes up every few milliseconds, because some networks only make progress on one-sided operations inside MPI
calls. Price: a few hundred bytes per unit on every rank, for the list of units.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, SharedCounters
from mixtera_hpc.index.scan.scan_log import ScanLog
from mixtera_hpc.index.scan.scan_result import ScanResult

__all__ = ["ProgressCallback", "ScanProgress", "ScanTasks", "scan_in_parallel"]

POLL_S = 5e-3
CANCEL_TIMEOUT_S = 1.0
"""A failed scan is reported after at most this long, even if another thread still scans."""
BATCH_BYTES = 16 << 20
"""Units are batched up to this size, so that small shards do not cost a fetch-and-add each."""
BATCHES_PER_WORKER = 8
"""Batches are made smaller where this many per worker would not fit: the last ones even out the load."""
NEXT_BATCH, UNITS_DONE, ROWS_DONE, BYTES_DONE = range(4)
"""The shared counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanProgress:
    """Amount that all ranks together have scanned so far."""

    rows: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanTasks:
    """The units to scan; the same on every rank."""

    sizes: Sequence[int]
    """Bytes of every unit."""
    missing: Sequence[int]
    """The units that are not in a log yet."""
    folder: Path
    """Folder of the logs."""
    attempt: int
    """Number of this attempt; log names begin with it."""
    threads: int
    """Workers per rank."""

    def batches(self, num_ranks: int) -> list[list[int]]:
        """Group the missing units into batches that are claimed at once, the largest units first."""
        total = sum(self.sizes[unit] for unit in self.missing)
        # Smaller batches if there is little work, so that every worker gets several.
        target = min(BATCH_BYTES, total // (BATCHES_PER_WORKER * num_ranks * self.threads))
        batches: list[list[int]] = []
        size = target + 1
        for unit in sorted(self.missing, key=lambda unit: -self.sizes[unit]):
            if size >= target:
                batches.append([])
                size = 0
            batches[-1].append(unit)
            size += max(self.sizes[unit], 1)
        return batches


ScanFunction = Callable[[int], Iterator[ScanResult]]
"""Yields the results of a unit; several threads call it at once."""
ProgressCallback = Callable[[ScanProgress], None]


def scan_in_parallel(
    tasks: ScanTasks, scan: ScanFunction, comm: Communicator, progress: ProgressCallback | None
) -> None:
    """Scan all missing units and log their results. **Collective.**

    Args:
        tasks: the units to scan.
        scan: scans one unit.
        comm: the ranks that share the work.
        progress: called on rank 0, after each of its units and a few times per second for those of other ranks.
    """
    counters = comm.Allocate_counters(4)
    rank = _RankScanner(tasks, comm, counters, progress if comm.rank == 0 else None)
    rank.scan_all(scan)
    # Rank 0 has no units left; it reports for the others until they are done.
    while comm.rank == 0 and not rank.report_progress():
        time.sleep(10 * POLL_S)
    comm.Barrier()
    # Not earlier: a late rank may still be reading the counters.
    counters.Free()


class _RankScanner:
    """The main thread of one rank."""

    def __init__(
        self, tasks: ScanTasks, comm: Communicator, counters: SharedCounters, progress: ProgressCallback | None
    ) -> None:
        self._tasks = tasks
        self._comm = comm
        self._counters = counters
        self._progress = progress
        self._batches = tasks.batches(comm.size)
        self._claimed: deque[int] = deque()
        self._bytes_total = sum(tasks.sizes[unit] for unit in tasks.missing)
        self._reported_units = 0

    def scan_all(self, scan: ScanFunction) -> None:
        """Keep all workers busy until no unit is left to claim and all claimed units are scanned.

        Raises:
            BaseException: the error that `scan` raised in a worker.
        """
        finished: queue.Queue[_FinishedUnit] = queue.Queue()
        workers = [_ScanWorker(scan, self._open_log(number), finished) for number in range(self._tasks.threads)]
        try:
            self._hand_out_units(workers, finished)
        except BaseException:
            for worker in workers:
                worker.cancel()
            raise
        for worker in workers:
            worker.stop()

    def _hand_out_units(self, workers: Sequence["_ScanWorker"], finished: "queue.Queue[_FinishedUnit]") -> None:
        idle = list(workers)
        # Only rank 0 holds the counters, so only it must enter MPI regularly.
        poll_s = POLL_S if self._comm.rank == 0 and self._comm.size > 1 else None
        while True:
            while idle and (unit := self._claim_unit()) is not None:
                idle.pop().units.put(unit)
            # No unit is left, and all workers are idle.
            if len(idle) == len(workers):
                break
            try:
                unit_done = finished.get(timeout=poll_s)
            except queue.Empty:
                self.report_progress()
                continue
            if unit_done.error is not None:
                raise unit_done.error
            self._count(unit_done)
            idle.append(unit_done.worker)

    def report_progress(self) -> bool:
        """Report the progress of all ranks; return True if all units are done."""
        units = self._counters.Fetch_and_add(UNITS_DONE, 0)
        if self._progress is not None and units > self._reported_units:
            self._progress(
                ScanProgress(
                    rows=self._counters.Fetch_and_add(ROWS_DONE, 0),
                    bytes_done=self._counters.Fetch_and_add(BYTES_DONE, 0),
                    bytes_total=self._bytes_total,
                )
            )
        self._reported_units = units
        return bool(units == len(self._tasks.missing))

    def _count(self, unit_done: "_FinishedUnit") -> None:
        self._counters.Fetch_and_add(ROWS_DONE, unit_done.rows)
        self._counters.Fetch_and_add(BYTES_DONE, self._tasks.sizes[unit_done.unit])
        # Last: a rank that sees this unit counted sees its rows and bytes as well.
        self._counters.Fetch_and_add(UNITS_DONE, 1)
        if self._comm.rank == 0:
            self.report_progress()

    def _claim_unit(self) -> int | None:
        """Return another unit for this rank; None if none is left."""
        if not self._claimed and self._batches:
            number = self._counters.Fetch_and_add(NEXT_BATCH, 1)
            if number < len(self._batches):
                self._claimed.extend(self._batches[number])
            else:
                self._batches = []
        return self._claimed.popleft() if self._claimed else None

    def _open_log(self, worker: int) -> ScanLog:
        return ScanLog(self._tasks.folder, f"{self._tasks.attempt:03d}-{self._comm.rank:05d}-{worker:03d}")


@dataclass(frozen=True, slots=True)
class _FinishedUnit:
    """A message of a worker to the main thread."""

    worker: "_ScanWorker"
    unit: int
    rows: int
    error: BaseException | None


class _ScanWorker:
    """A thread that scans and logs the units it receives."""

    def __init__(self, scan: ScanFunction, log: ScanLog, finished: "queue.Queue[_FinishedUnit]") -> None:
        self.units: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._scan = scan
        self._log = log
        self._finished = finished
        self._is_cancelled = False
        # A daemon, so that a hanging read cannot keep a failed process alive.
        self._thread = threading.Thread(target=self._run, daemon=True, name="scan")
        self._thread.start()

    def stop(self) -> None:
        """Wait until the thread has ended, after the units that it was given."""
        self.units.put(None)
        self._thread.join()

    def cancel(self) -> None:
        """End the thread after the result it is working on, and wait for it a short time: another one has failed."""
        self._is_cancelled = True
        self.units.put(None)
        self._thread.join(CANCEL_TIMEOUT_S)

    def _run(self) -> None:
        while (unit := self.units.get()) is not None:
            try:
                self._finished.put(_FinishedUnit(self, unit, self._scan_and_log(unit), None))
            except BaseException as error:  # The main thread raises it.
                self._finished.put(_FinishedUnit(self, unit, 0, error))
        # Closing writes again what the disk did not take; the unit has failed, and the main thread knows.
        with contextlib.suppress(OSError):
            self._log.close()

    def _scan_and_log(self, unit: int) -> int:
        """Scan and log one unit; return its number of rows."""
        rows = 0
        number = 0
        previous: ScanResult | None = None
        # A result is logged when the next one is there: the last must be marked.
        for result in self._scan(unit):
            if previous is not None:
                self._log.append(unit, number, previous, last=False)
                number += 1
            if self._is_cancelled:
                return rows
            previous = result
            rows += result.num_rows
        if previous is not None:
            self._log.append(unit, number, previous, last=True)
        return rows
