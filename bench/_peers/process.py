"""One measured system in its own process: `python -m bench._peers.process CALL OPTIONS WORKLOAD`.

Runs under the interpreter of the system's environment. CALL is `module.function` below `bench._peers`; the function
returns an endless iterator of counts, one per batch. For every line on standard input, a number of CPU seconds, the
process serves batches for that long and prints one JSON object. Everything else that is printed goes to standard error.

CPU time is that of all threads and child processes. Before and after a round the process waits until background threads
have filled their queues, so that the round contains the work for exactly the batches that it counts.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench._peers.workload import Workload

OPEN_FILES = 1024
QUIET_S = 0.1
QUIET_SHARE = 0.02
"""A process is idle if it uses less than this share of a core for `QUIET_S` seconds."""
MAX_SETTLING_S = 10.0
CHECK_EVERY_S = 0.02
"""Time between two looks at the CPU time, which costs as much as some rows."""
MAX_WALL_PER_CPU = 6.0
"""Longest round in seconds of wall time, per CPU second that was asked for."""


def main(call: str, options: str, workload: str) -> None:
    """Open the system, then serve rounds until standard input ends."""
    # Results have a file descriptor of their own, since libraries print to standard output.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    use_one_core()
    limit_open_files()
    module, _, function = call.partition(".")
    start = getattr(importlib.import_module(f"bench._peers.{module}"), function)
    began_s = time.monotonic()
    batches: Iterator[int] = start(Workload.from_json(workload), **json.loads(options))
    next(batches)
    results.write(json.dumps({"first_batch_s": time.monotonic() - began_s}) + "\n")
    for line in sys.stdin:
        results.write(json.dumps(serve(batches, float(line))) + "\n")


def serve(batches: Iterator[int], cpu_budget_s: float) -> dict[str, Any]:
    """Serve batches for some CPU time; return their number of items, and what they cost."""
    settle()
    began_s = cpu_s()
    began_wall_s = time.monotonic()
    next_check_s = began_wall_s + CHECK_EVERY_S
    count = 0
    for batch in batches:
        count += batch
        now_s = time.monotonic()
        if now_s < next_check_s:
            continue
        if cpu_s() - began_s > cpu_budget_s or now_s - began_wall_s > MAX_WALL_PER_CPU * cpu_budget_s:
            break
        next_check_s = now_s + CHECK_EVERY_S
    wall_s = time.monotonic() - began_wall_s
    settle()
    return {"count": count, "cpu_s": cpu_s() - began_s, "wall_s": wall_s}


def settle() -> None:
    """Wait until the background threads and child processes of this process are idle."""
    deadline = time.monotonic() + MAX_SETTLING_S
    while time.monotonic() < deadline:
        before_s = cpu_s()
        time.sleep(QUIET_S)
        if cpu_s() - before_s < QUIET_SHARE * QUIET_S:
            return


def cpu_s() -> float:
    """Return the CPU time of this process and of its living child processes."""
    total = time.process_time()
    for pid in _descendants(os.getpid()):
        # The CPU clock of another process, as clock_getcpuclockid(3) returns it on Linux.
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from _descendants(child)


def use_one_core() -> None:
    """Stay on one core where the system allows it."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def limit_open_files() -> None:
    """Allow as many open files as most systems do by default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # The system allows even fewer.
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


if __name__ == "__main__":
    main(*sys.argv[1:])
