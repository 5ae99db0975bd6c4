"""Run a job that writes an index: what building, refreshing and deriving have in common.

Rank 0 makes a plan and broadcasts it. All ranks scan the units that are missing. Rank 0 writes the index, removes the
logs and broadcasts the report. One job at a time may work on an index. What a killed job has scanned is reused by the
next job that does the same; a job that does anything else removes it.
"""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import h5py
import msgspec

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.disk_errors import explain_disk_errors
from mixtera_hpc.index.layout import VERSION, building_folder, failure_file
from mixtera_hpc.index.open_file import DAMAGE
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanTasks, scan_in_parallel
from mixtera_hpc.index.scan.scan_log import LOG_PATTERN, LogRecord, build_lock, complete_units, read_logs, recover_logs
from mixtera_hpc.index.scan.scan_result import ScanResult
from mixtera_hpc.index.shards import Shard

__all__ = ["AfterScan", "IndexJob", "ScanPlan", "UnitRecords", "follow_index_job", "lead_index_job"]

T = TypeVar("T")
UnitRecords = dict[int, list[LogRecord]]
"""Unit → its logged results, in order."""
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""First bytes of every HDF5 file of ours. h5py.is_hdf5 returns False for a file that it cannot lock."""


class ScanPlan(msgspec.Struct, kw_only=True):
    """Plan of what is to be scanned. Rank 0 broadcasts it."""

    shards: list[Shard]
    """The shards of the new index, in order."""
    units: list[tuple[int, int, int]]
    """Position of a shard, start and stop of the unit; in index order."""
    sizes: list[int]
    """Bytes of every unit."""
    key: str = ""
    """Digest of everything that the results depend on."""
    done: list[int] = []
    """Units that an earlier attempt has scanned."""
    attempt: int = 1
    """Number of this attempt, counted from 1."""
    keeps_tokens: bool = False
    """True if the token ids that a scan makes are kept for a token store."""
    writes_rows: bool = False
    """True if rows are written to a row store after the scan."""

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that remain to be scanned."""
        return sum(self.sizes) - sum(self.sizes[unit] for unit in self.done)


class AfterScan(Protocol):
    """A maker of a store from the rows that a job scans."""

    def begin(self, plan: ScanPlan) -> None:
        """Set `plan.keeps_tokens` and `plan.writes_rows`; rank 0 only, before any unit is scanned."""
        ...

    def finish(self, plan: ScanPlan, records: UnitRecords | None) -> None:
        """Write the store, after the index has its final name; rank 0 gives the records. **Collective.**"""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexJob:
    """Description of how units are scanned; the same on every rank."""

    path: Path
    """The index to write."""
    depends_on: Any
    """Everything on which a result depends besides its unit; must be convertible to JSON."""
    threads: int
    """Scanning threads per rank."""
    scan: Callable[[ScanPlan, int], Iterator[ScanResult]]
    """Yields the results of a unit; several threads call it at once."""
    store: AfterScan | None = None
    """The maker of a store of tokens or rows; None if no store is wanted."""


def lead_index_job(
    job: IndexJob,
    plan: ScanPlan,
    comm: Communicator,
    finish: Callable[[ScanPlan, UnitRecords], T],
    progress: ProgressCallback | None,
) -> T:
    """Run a job on rank 0 while all other ranks call `follow_index_job`; return what `finish` returns. **Collective.**

    Args:
        job: how units are scanned.
        plan: what is to be scanned.
        comm: all ranks.
        finish: writes the index from the logged results.
        progress: called while units are scanned.

    Raises:
        PropertyIndexError: the index cannot be written, would replace another file, or another process works on it.
    """
    folder = building_folder(job.path)
    # Before anything is read: a typing error in index.path should not cost an hour.
    _check_place(job.path)
    _make_folder(folder)
    # Twice: around the lock, and inside of `_record_failure`, so that the explained error is recorded.
    explained = _explain_disk_errors(folder)
    with _explain_disk_errors(folder), build_lock(folder), _record_failure(job.path), explained:
        failure_file(job.path).unlink(missing_ok=True)
        _resume(folder, plan, job.depends_on)
        if job.store is not None:
            job.store.begin(plan)
        # Only now, since other ranks write logs as soon as they have the plan.
        bcast_bytes(comm, msgspec.json.encode(plan))
        _scan_missing(job, plan, comm, progress)
        records = _read_back(folder, len(plan.units))
        report = finish(plan, records)
        if job.store is not None:
            job.store.finish(plan, records)
        # The index has its final name; the logs are not needed any more.
        _remove_logs(folder)
    with contextlib.suppress(OSError):  # Most often it is gone.
        folder.rmdir()
    bcast_bytes(comm, msgspec.json.encode(report))
    return report


def follow_index_job(job: IndexJob, comm: Communicator, report_type: type[T]) -> T:
    """Scan units on a rank other than 0, which calls `lead_index_job`; return its report. **Collective.**"""
    plan = msgspec.json.decode(bcast_bytes(comm, None), type=ScanPlan)
    with _record_failure(job.path), _explain_disk_errors(building_folder(job.path)):
        _scan_missing(job, plan, comm, None)
        if job.store is not None:
            job.store.finish(plan, None)
    return msgspec.json.decode(bcast_bytes(comm, None), type=report_type)


def _scan_missing(job: IndexJob, plan: ScanPlan, comm: Communicator, progress: ProgressCallback | None) -> None:
    done = set(plan.done)
    tasks = ScanTasks(
        sizes=plan.sizes,
        missing=[unit for unit in range(len(plan.units)) if unit not in done],
        folder=building_folder(job.path),
        attempt=plan.attempt,
        threads=job.threads,
    )
    scan_in_parallel(tasks, lambda unit: job.scan(plan, unit), comm, progress)


def _check_place(path: Path) -> None:
    """Refuse to replace anything but an index: most often it is a shard, or a folder of shards."""
    if not path.exists() or (path.is_file() and _is_index(path)):
        return
    kind = "a folder" if path.is_dir() else "no property index"
    raise PropertyIndexError(
        f"index.path is {path}, which is {kind} and would be replaced.\n"
        "  Set index.path to a new file, or remove this one first."
    )


def _is_index(path: Path) -> bool:
    """Return whether a file is an index, perhaps a damaged one."""
    # An empty file has nothing to lose.
    with path.open("rb") as start:
        signature = start.read(len(HDF5_SIGNATURE))
    if signature != HDF5_SIGNATURE:
        return not signature
    try:
        with h5py.File(path, "r", locking=False) as file:
            return "chunk_rows" in file.attrs
    except DAMAGE:
        # HDF5 by its signature, but damaged: most likely an index.
        return True


def _remove_logs(folder: Path) -> None:
    """Remove the building folder, whose lock is open: NFS and FUSE keep an open file under a name like `.nfs0001`."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PropertyIndexError(
            f"The index cannot be written to {folder.parent}: {error.strerror}.\n  Set index.path to a writable folder."
        ) from None


@contextlib.contextmanager
def _record_failure(path: Path) -> Iterator[None]:
    """Write the error that ends the job beside the index, for those who look for the index later."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        # The disk may be the reason why the job failed.
        with contextlib.suppress(OSError):
            failure_file(path).write_text("\n".join([f"{type(error).__name__}: {error}", *notes]))
        raise


def _explain_disk_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Say what to do if the disk does not accept the data."""
    return explain_disk_errors(
        PropertyIndexError,
        folder,
        f"The index cannot be written to {folder.parent}",
        "Make room, or make the folder writable, and run this again: it continues from what was scanned so far, which "
        f"is in {folder.name}. Or set index.path to another place.",
    )


def _resume(folder: Path, plan: ScanPlan, depends_on: Any) -> None:
    """Mark as done in `plan` what an earlier attempt at the same job has scanned; remove the logs of other jobs."""
    # Any difference in shards, units or settings makes another key, and other results.
    described = msgspec.json.encode([VERSION, plan.shards, plan.units, depends_on])
    plan.key = hashlib.blake2b(described, digest_size=16).hexdigest()
    marker = folder / "key"
    if marker.exists() and marker.read_text() == plan.key:
        # Logs of this job: earlier attempts may have had any number of ranks.
        plan.done = sorted(complete_units(recover_logs(folder)))
    else:
        for path in folder.glob(LOG_PATTERN):
            path.unlink()
        marker.write_text(plan.key)
    # Log names are ATTEMPT-RANK-WORKER; see `parallel_scan`.
    attempts = [int(path.stem.split("-")[0]) for path in folder.glob(LOG_PATTERN)]
    plan.attempt = 1 + max(attempts, default=0)


def _read_back(folder: Path, num_units: int) -> UnitRecords:
    # All ranks have passed the barrier of the scan, so all results should be visible here.
    records = complete_units(read_logs(folder))
    num_missing = num_units - len(records)
    if num_missing:
        raise PropertyIndexError(
            f"{num_missing} scanned units are not in {folder}. Do all ranks see the same folder?\n"
            "  Set index.path to a file system that all nodes share, and build again."
        )
    return records
