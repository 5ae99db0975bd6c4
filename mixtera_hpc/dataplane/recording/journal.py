"""Record on disk which chunks were planned and which sequences were consumed.

The journal is one append-only JSONL file per run, written by rank 0: a line when an attempt begins (`open`), one per
chunk (`chunk`, O(domains) numbers) and one when it ends in order (`close`); in a forked run also one where the parent's
lines end (`fork`). The audit log, with `dataplane.audit`, is one JSONL file per rank and attempt with a digest of every
sequence handed to the trainer. Lines are written whole and flushed, so a killed run loses at most its last line, which
readers skip.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import DataError
from mixtera_hpc.track.append_file import AppendFile

__all__ = [
    "FORK_KIND",
    "AttemptSetup",
    "AuditLog",
    "Journal",
    "append_line",
    "last_attempt",
    "read_lines",
]


FORK_KIND = "fork"
"""Kind of the line in the journal of a forked run that names the parent. The lines before it are the parent's."""


class AppendOnlyLines:
    """A JSONL file that is only ever appended to."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path` for appending; its folder is created.

        Raises:
            DataError: the file cannot be opened.
        """
        self._file = AppendFile(path)
        self._file.truncate_incomplete_line()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            DataError: the record cannot be written; the file is as before.
        """
        self._file.append(msgspec.json.encode(record) + b"\n")

    def sync(self) -> None:
        """Wait until all records are on disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSONL file; it is on disk when this returns."""
    file = AppendOnlyLines(path)
    try:
        file.write(record)
        # A decision must survive a crash of the node before anything acts on it.
        file.sync()
    finally:
        file.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptSetup:
    """Facts with which an attempt begins."""

    first_step: int
    num_ranks: int
    model_parallel_size: int
    """Ranks that get the same batches."""
    data_parallel_ranks: Sequence[int] | None
    """Data-parallel coordinate of every rank; None if ranks of one group are neighbours."""
    identity: Mapping[str, Any]
    """Identity of the source that the attempt serves; see `Source.identity`."""
    stream_version: StreamVersion


class Journal(AppendOnlyLines):
    """The plans of a run; written by rank 0 only."""

    def __init__(self, path: Path, attempt: int) -> None:
        """Open the journal at `path` for the lines of one attempt."""
        super().__init__(path)
        self._attempt = attempt

    def write_start(self, setup: AttemptSetup) -> None:
        """Record that an attempt begins. What earlier attempts planned from its first step on no longer counts."""
        facts = {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)}
        facts["stream_version"] = setup.stream_version.to_dict()
        self.write({"kind": "open", "attempt": self._attempt, **facts})

    def write_plan(self, plan: ChunkPlan) -> None:
        """Record the plan of a chunk."""
        self.write(
            {
                "kind": "chunk",
                "attempt": self._attempt,
                "chunk": plan.chunk,
                "first_step": plan.first_step,
                "num_steps": plan.num_steps,
                "last": plan.last,
                "cursors": plan.cursors.tolist(),
                "lags": plan.lags.tolist(),
                "weights": plan.weights.tolist(),
                "digest": plan.digest,
            }
        )

    def write_close(self, next_step: int) -> None:
        """Record that the attempt ends in order; every step before `next_step` was consumed."""
        self.write({"kind": "close", "attempt": self._attempt, "next_step": next_step})


class AuditLog(AppendOnlyLines):
    """Digests of what one rank handed to its trainer."""

    def write_batch(self, step: int, positions: NDArray[np.int64], digests: list[str]) -> None:
        """Record one batch."""
        self.write({"step": step, "positions": positions.tolist(), "digests": digests})


def last_attempt(path: Path) -> int:
    """Return the number of the last attempt in the journal at `path`; 0 when there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        # Decode one line per attempt, not one per chunk.
        starts = [line for line in file if line.startswith(b'{"kind":"open"') and line.endswith(b"\n")]
    return max((int(msgspec.json.decode(line)["attempt"]) for line in starts), default=0)


def read_lines(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file, without a last line that was cut short.

    Raises:
        DataError: another line is damaged. If `damaged` is given, it gets the numbers of such lines, from 1, instead.
    """
    # The element after the last newline is empty, or a line that was cut short.
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.\n  Restore the file.") from None
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if number == len(lines) - 1:
                return
            if damaged is None:
                raise DataError(f"{path} line {number + 1} is damaged: {error}.\n  Restore the file.") from None
            damaged.append(number + 1)
