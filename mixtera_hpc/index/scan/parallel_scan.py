"""Units scanned by all ranks together: each takes the next when it is free, so nobody waits for the slow.

Units are handed out from large to small, small ones by the handful, through one shared counter: one fetch-and-add per handful,
no messages, no master. Workers are threads; the main thread of a rank claims units and, alone, talks MPI. On rank 0 it wakes
every few milliseconds, which keeps the counter going on networks that need the help. Price: some hundred bytes per unit and
rank, for the list of units.
"""

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

__all__ = ["ScanProgress", "ScanTasks", "scan_in_parallel"]

POLL_S = 5e-3
HANDFUL_BYTES = 16 << 20
NEXT, UNITS, ROWS, BYTES = range(4)
"""What the counters count: handfuls given out, and what is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanProgress:
    """How far all ranks have come."""

    rows: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanTasks:
    """What there is to scan; the same on every rank."""

    sizes: Sequence[int]
    """Bytes of every unit."""
    missing: Sequence[int]
    """The units to scan."""
    folder: Path
    """Where the logs go."""
    attempt: int
    threads: int

    def handfuls(self, num_ranks: int) -> list[list[int]]:
        """Units that are claimed at once, the largest first; at least some for every worker."""
        total = sum(self.sizes[i] for i in self.missing)
        enough = min(HANDFUL_BYTES, total // (8 * num_ranks * self.threads))
        found: list[list[int]] = []
        held = enough + 1
        for unit in sorted(self.missing, key=lambda i: -self.sizes[i]):
            if held >= enough:
                found.append([])
                held = 0
            found[-1].append(unit)
            held += max(self.sizes[unit], 1)
        return found


ScanFunction = Callable[[int], Iterator[ScanResult]]
ProgressCallback = Callable[[ScanProgress], None]


def scan_in_parallel(tasks: ScanTasks, scan: ScanFunction, comm: Communicator, report: ProgressCallback | None) -> None:
    """Scan all units and log their parts. **Collective.**

    Args:
        scan: the parts of a unit; called by several threads at once.
        report: called on rank 0 after each of its units, and some times a second for those of others.
    """
    counters = comm.Allocate_counters(4)
    rank = _RankScanner(tasks, comm, counters, report if comm.rank == 0 else None)
    rank.work(scan)
    while comm.rank == 0 and not rank.tell():
        time.sleep(10 * POLL_S)
    comm.Barrier()
    counters.Free()


class _RankScanner:
    """The main thread of one rank."""

    def __init__(
        self, tasks: ScanTasks, comm: Communicator, counters: SharedCounters, report: ProgressCallback | None
    ) -> None:
        self._tasks = tasks
        self._comm = comm
        self._counters = counters
        self._report = report
        self._handfuls = tasks.handfuls(comm.size)
        self._claimed: deque[int] = deque()
        self._total = sum(tasks.sizes[i] for i in tasks.missing)
        self._told = -1

    def work(self, scan: ScanFunction) -> None:
        """Keep all workers busy until no unit is left."""
        done: queue.SimpleQueue[_FinishedUnit] = queue.SimpleQueue()
        workers = [_ScanWorker(scan, self._log(number), done) for number in range(self._tasks.threads)]
        idle, poll_s = list(workers), POLL_S if self._comm.rank == 0 and self._comm.size > 1 else None
        try:
            while True:
                while idle and (unit := self._next()) is not None:
                    idle.pop().units.put(unit)
                if len(idle) == len(workers):
                    break
                try:
                    finished = done.get(timeout=poll_s)
                except queue.Empty:
                    self.tell()
                    continue
                idle.append(finished.worker)
                if finished.error is not None:
                    raise finished.error
                self._count(finished)
        finally:
            # After an error, a worker that still scans ends after its unit; nobody waits for it.
            for worker in workers:
                worker.units.put(None)
            for worker in idle:
                worker.join()

    def tell(self) -> bool:
        """Report what all ranks have done; returns whether that is everything."""
        units = self._counters.Fetch_and_add(UNITS, 0)
        if self._report is not None and units > max(self._told, 0):
            self._report(
                ScanProgress(
                    rows=self._counters.Fetch_and_add(ROWS, 0),
                    bytes_done=self._counters.Fetch_and_add(BYTES, 0),
                    bytes_total=self._total,
                )
            )
        self._told = units
        return units == len(self._tasks.missing)

    def _count(self, finished: "_FinishedUnit") -> None:
        self._counters.Fetch_and_add(ROWS, finished.rows)
        self._counters.Fetch_and_add(BYTES, self._tasks.sizes[finished.unit])
        self._counters.Fetch_and_add(UNITS, 1)
        if self._comm.rank == 0:
            self.tell()

    def _next(self) -> int | None:
        """Another unit for this rank, None when there is none left."""
        if not self._claimed and self._handfuls:
            number = self._counters.Fetch_and_add(NEXT, 1)
            self._claimed.extend(self._handfuls[number] if number < len(self._handfuls) else ())
            if not self._claimed:
                self._handfuls = []
        return self._claimed.popleft() if self._claimed else None

    def _log(self, worker: int) -> ScanLog:
        return ScanLog(self._tasks.folder, f"{self._tasks.attempt:03d}-{self._comm.rank:05d}-{worker:03d}")


@dataclass(frozen=True, slots=True)
class _FinishedUnit:
    worker: "_ScanWorker"
    unit: int
    rows: int
    error: BaseException | None


class _ScanWorker:
    """A thread that scans the units it is given, and logs them."""

    def __init__(self, scan: ScanFunction, log: ScanLog, done: "queue.SimpleQueue[_FinishedUnit]") -> None:
        self.units: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._scan, self._log, self._done = scan, log, done
        self._thread = threading.Thread(target=self._run, daemon=True, name="scan")
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended; put None into `units` first."""
        self._thread.join()

    def _run(self) -> None:
        while (unit := self.units.get()) is not None:
            try:
                self._done.put(_FinishedUnit(self, unit, self._unit(unit), None))
            except BaseException as error:  # The main thread raises it.
                self._done.put(_FinishedUnit(self, unit, 0, error))
        self._log.close()

    def _unit(self, unit: int) -> int:
        """Scan and log one unit; returns its rows."""
        rows, number, held = 0, 0, None
        for part in self._scan(unit):
            if held is not None:
                self._log.append(unit, number, held, last=False)
                number += 1
            held = part
            rows += part.num_rows
        if held is not None:
            self._log.append(unit, number, held, last=True)
        return rows
