"""One attempt at an index: what building, refreshing and deriving have in common.

Rank 0 makes a plan and tells it to the others; all scan what is missing; rank 0 finishes, removes the logs and tells what came
of it. One process at a time works on an index; what an attempt that was killed has scanned is found by the next attempt at the
same thing, and removed by one at anything else.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import msgspec

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.discover import Shard
from mixtera_hpc.index.layout import VERSION
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanTasks, scan_in_parallel
from mixtera_hpc.index.scan.scan_log import (
    LogRecord,
    build_lock,
    building_folder,
    complete_units,
    read_logs,
    recover_logs,
)
from mixtera_hpc.index.scan.scan_result import ScanResult

__all__ = ["IndexJob", "ScanPlan", "run_index_job"]

T = TypeVar("T")


class ScanPlan(msgspec.Struct, kw_only=True):
    """What rank 0 tells the others."""

    shards: list[Shard]
    """What the index will hold, in order."""
    units: list[tuple[int, int, int]]
    """Position of a shard, start and stop; in index order."""
    sizes: list[int]
    """Bytes of every unit."""
    key: str = ""
    """Of everything a part depends on."""
    done: list[int] = []
    """Units whose parts were found."""
    number: int = 1
    """Of the attempt."""

    @property
    def missing_bytes(self) -> int:
        """What is to be read."""
        return sum(self.sizes) - sum(self.sizes[unit] for unit in self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexJob:
    """The parts of one."""

    path: Path
    """Of the index."""
    depends: Any
    """What a part depends on besides its unit; goes through JSON."""
    threads: int
    scan: Callable[[ScanPlan, int], Iterator[ScanResult]]
    """The parts of a unit; called by several threads at once."""


UnitRecords = dict[int, list[LogRecord]]
"""The parts of every unit."""


def run_index_job(
    job: IndexJob,
    comm: Communicator,
    make_plan: Callable[[], ScanPlan],
    finish: Callable[[ScanPlan, UnitRecords], T],
    kind: type[T],
    report: ProgressCallback | None,
) -> T:
    """Carry it out; returns what `finish` returned, which runs on rank 0 like `make_plan`. **Collective.**

    Raises:
        PropertyIndexError: the index cannot be written, would take the place of something else, or another process works on it.
    """
    folder = building_folder(job.path)
    if comm.rank > 0:
        with _room(folder):
            _scan(job, msgspec.json.decode(bcast_bytes(comm, None), type=ScanPlan), comm, None)
        return msgspec.json.decode(bcast_bytes(comm, None), type=kind)
    _check_place(job.path)
    plan = make_plan()
    _make(folder)
    with build_lock(folder), _room(folder):
        _resume(folder, plan, job.depends)
        bcast_bytes(comm, msgspec.json.encode(plan))
        _scan(job, plan, comm, report)
        result = finish(plan, _found(folder, len(plan.units)))
        shutil.rmtree(folder)
    bcast_bytes(comm, msgspec.json.encode(result))
    return result


def _scan(job: IndexJob, plan: ScanPlan, comm: Communicator, report: ProgressCallback | None) -> None:
    done = set(plan.done)
    tasks = ScanTasks(
        sizes=plan.sizes,
        missing=[unit for unit in range(len(plan.units)) if unit not in done],
        folder=building_folder(job.path),
        attempt=plan.number,
        threads=job.threads,
    )
    scan_in_parallel(tasks, lambda unit: job.scan(plan, unit), comm, report)


def _check_place(path: Path) -> None:
    """Refuse to replace what is no index: most often a shard, or a folder of them."""
    if not path.exists() or (path.is_file() and _is_index(path)):
        return
    raise PropertyIndexError(
        f"index.path is {path}, which is {'a folder' if path.is_dir() else 'no property index'}, and would be replaced by one.\n"
        "  Set index.path to a file of its own, or remove this one first."
    )


def _is_index(path: Path) -> bool:
    """Whether a file is, or was before it was damaged, an index."""
    if not h5py.is_hdf5(path):
        return path.stat().st_size == 0
    try:
        with h5py.File(path, "r", locking=False) as file:
            return "chunk_rows" in file.attrs
    except (OSError, RuntimeError):
        return True


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PropertyIndexError(
            f"The index cannot be written to {folder.parent}: {error.strerror}.\n  Set index.path to a place you can write to."
        ) from None


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Say what to do where the disk takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise PropertyIndexError(
            f"The index cannot be written to {folder.parent}: {os.strerror(error.errno)}.\n  Make room and run this again: it "
            f"goes on from what was scanned, which is kept in {folder.name}. Or set index.path to another place."
        ) from None


def _resume(folder: Path, plan: ScanPlan, depends: Any) -> None:
    """Keep the parts of an earlier attempt at the very same thing, remove others."""
    described = msgspec.json.encode([VERSION, plan.shards, plan.units, depends])
    plan.key = hashlib.blake2b(described, digest_size=16).hexdigest()
    marker = folder / "key"
    if marker.exists() and marker.read_text() == plan.key:
        plan.done = sorted(complete_units(recover_logs(folder)))
    else:
        for path in folder.glob("*.parts"):
            path.unlink()
        marker.write_text(plan.key)
    plan.number = 1 + max((int(p.stem.split("-")[0]) for p in folder.glob("*.parts")), default=0)


def _found(folder: Path, num_units: int) -> UnitRecords:
    found = complete_units(read_logs(folder))
    missing = num_units - len(found)
    if missing:
        raise PropertyIndexError(
            f"{missing} scanned units cannot be read back from {folder}: do all ranks see the same folder?\n"
            "  Set index.path to a file system that all nodes share, and build again."
        )
    return found
