"""Fixtures that all kinds of tests share."""

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.testing.small_collection import make_collection

MAX_LEAKED_DESCRIPTORS = 4
"""Some libraries open a file once per process, for example a random source or a time zone."""

IN_A_THREAD = "dataplane.workers=0"
"""Override that saves most tests the start of a process; `test_workers.py` covers the processes."""

GRACE_S = 60.0
"""Time for threads and processes that were told to end. They take milliseconds, unless the machine is busy."""


LONG_FILES = {
    *("test_wrong_inputs.py", "test_decompression_bombs.py", "test_odd_paths.py", "test_odd_rows.py"),
    *("test_torchtitan.py", "test_huggingface.py", "test_lightning.py", "test_torch.py", "test_megatron_layouts.py"),
}
"""Files of a minute or more. They come first: one that began last would keep one process busy alone."""

WAITING_FILES = ("test_cluster.py", "test_watchdog.py", "test_cluster_runs.py", "test_cluster_launchers.py")
"""Files whose tests mostly wait for jobs. One process runs all of them, so that the other ones keep the cores busy."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate((*WAITING_FILES, *sorted(LONG_FILES)))}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler of `--dist loadfile`, for which all waiting files are one; None for other options."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # Where this hook is called, xdist is installed.

    class WaitingFilesTogether(LoadFileScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "waiting files" if Path(file).name in WAITING_FILES else file

    return WaitingFilesTogether(config, log)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of all later collections of garbage, which would visit it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def free_port() -> int:
    """Return a port that nobody else is given: those that the kernel hands out begin at 32768."""
    for port in range(20000 + os.getpid() % 12000, 32768):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that name a small real collection with an index. Tests only read it."""
    return [*make_collection(tmp_path_factory.mktemp("collection")), IN_A_THREAD]


@pytest.fixture
def own_collection(tmp_path: Path) -> list[str]:
    """Return overrides like those of `collection`, for a copy that a test may damage."""
    return [*make_collection(tmp_path / "own"), IN_A_THREAD]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves descriptors, threads or child processes behind.

    The usual limit is 1,024 open files: a test that leaves a hundred of them open makes others fail.
    """
    before = _Resources.now()
    yield
    leaks = _Resources.now().leaked_since(before)
    deadline = time.monotonic() + GRACE_S
    while leaks and time.monotonic() < deadline:
        gc.collect()  # Objects in reference cycles free what they hold when they are collected.
        time.sleep(0.05)
        leaks = _Resources.now().leaked_since(before)
    if leaks:
        pytest.fail(f"the test left {len(leaks)} things behind: {'; '.join(leaks[:8])}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def _no_leaked_shared_memory() -> Iterator[None]:
    """Fail the last test of a file whose tests leave shared memory mapped. Reading the mappings takes a millisecond."""
    before = _shared_memory()
    yield
    gc.collect()
    leaked = _shared_memory() - before
    if leaked:
        pytest.fail(f"the tests of this file left shared memory mapped: {', '.join(sorted(leaked)[:8])}", pytrace=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resources:
    """Resources that this process holds at one moment."""

    descriptors: dict[int, str]
    """Number → what it refers to."""
    threads: frozenset[threading.Thread]
    children: frozenset[str]
    """Process ids."""

    @classmethod
    def now(cls) -> "_Resources":
        return cls(
            descriptors=_open_descriptors(),
            threads=frozenset(threading.enumerate()),
            children=frozenset(_child_processes()),
        )

    def leaked_since(self, before: "_Resources") -> list[str]:
        leaks = [f"thread {thread.name}" for thread in self.threads - before.threads]
        leaks += [f"child process {pid}" for pid in self.children - before.children]
        opened = [target for number, target in self.descriptors.items() if number not in before.descriptors]
        if len(opened) > MAX_LEAKED_DESCRIPTORS:
            leaks += [f"descriptor of {target}" for target in opened]
        return leaks


def _open_descriptors() -> dict[int, str]:
    """Return what each open descriptor of this process refers to."""
    targets = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets[int(link.name)] = str(link.readlink())
        except OSError:
            continue  # The descriptor that listed the folder.
    return targets


def _child_processes() -> set[str]:
    """Return the process ids of direct children that still run, without Python's own resource tracker."""
    pids: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update((task / "children").read_text().split())
        except OSError:
            continue  # The thread has ended meanwhile.
    return {pid for pid in pids if b"resource_tracker" not in _command_line(pid)}


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _shared_memory() -> set[str]:
    """Return the shared-memory segments that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if "/dev/shm/" in line}
