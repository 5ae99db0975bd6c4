"""What was planned and what was consumed, kept on disk.

The journal is one append-only JSONL file per run, written by rank 0: a line when an attempt opens (`open`), one per chunk
(`chunk`, O(domains) numbers) and one when it closes in order (`close`). The audit, when asked for, is one JSONL file per rank
and attempt with a digest of every sequence handed to the trainer. Lines are written whole and flushed, so a killed run
loses at most its last line, which readers skip.
"""

import bisect
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import DataError
from mixtera_hpc.track.tracker import open_append

__all__ = [
    "AttemptRecord",
    "AttemptStart",
    "AuditLog",
    "History",
    "Journal",
    "append_line",
    "read_lines",
    "sample_digest",
    "sequence_digest",
]


def sequence_digest(tokens: NDArray[np.integer[Any]]) -> str:
    """16 hex digits of the tokens of one sequence."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=8).hexdigest()


def sample_digest(payload: Any) -> str:
    """16 hex digits of a sample's content."""
    try:
        raw = msgspec.msgpack.encode(payload, enc_hook=_plain)
    except OverflowError:  # An integer of more than 64 bits.
        raw = repr(payload).encode()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """What arrays and others are to a digest."""
    return [value.dtype.str, list(value.shape), value.tobytes()] if isinstance(value, np.ndarray) else repr(value)


class AppendOnlyLines:
    """A JSONL file that is only ever appended to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open_append(path)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")

    def close(self) -> None:
        self._file.close()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record to a JSONL file, on disk when this returns."""
    with open_append(path) as file:
        file.write(msgspec.json.encode(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStart:
    """What an attempt begins with."""

    first_step: int
    num_ranks: int
    model_parallel_size: int
    identity: Mapping[str, Any]
    stream_version: StreamVersion


class Journal(AppendOnlyLines):
    """The planner's log; rank 0 only."""

    def __init__(self, path: Path, attempt: int) -> None:
        super().__init__(path)
        self._attempt = attempt

    def opened(self, opening: AttemptStart) -> None:
        """An attempt begins: what earlier attempts planned from its first step on does not count."""
        facts = {field.name: getattr(opening, field.name) for field in dataclasses.fields(opening)}
        self.write(
            {"kind": "open", "attempt": self._attempt, **facts, "stream_version": opening.stream_version.to_dict()}
        )

    def planned(self, plan: ChunkPlan) -> None:
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

    def closed(self, next_step: int) -> None:
        """The attempt ends in order; every step before `next_step` was consumed."""
        self.write({"kind": "close", "attempt": self._attempt, "next_step": next_step})


class AuditLog(AppendOnlyLines):
    """What one rank handed to its trainer."""

    def consumed(self, step: int, positions: NDArray[np.int64], digests: list[str]) -> None:
        self.write({"step": step, "positions": positions.tolist(), "digests": digests})


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, without a last line that was cut short.

    Raises:
        DataError: another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            if number < len(lines) - 1:
                raise DataError(f"{path} line {number + 1} is damaged: {error}.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """What one attempt planned."""

    number: int
    first_step: int
    num_ranks: int
    model_parallel_size: int
    identity: Mapping[str, Any]
    """Of the source it served from."""
    stream_version: StreamVersion
    plans: list[ChunkPlan]
    """Ascending."""
    next_step: int | None
    """Where it closed; None when it was killed."""

    @property
    def global_batch_size(self) -> int:
        return int(self.identity["global_batch_size"])

    @property
    def end(self) -> int:
        """One past the last step it planned."""
        return max(
            (self.stream_version.step_at(p.first_step + p.num_steps) for p in self.plans), default=self.first_step
        )

    @property
    def served_end(self) -> int:
        """One past the last step it served, as far as that is known."""
        return self.end if self.next_step is None else self.next_step

    def rank_of(self, position: int) -> int:
        """The rank (first of its dp_group) that was given `position` of the global batch."""
        per_group = self.global_batch_size // (self.num_ranks // self.model_parallel_size)
        return position // per_group * self.model_parallel_size

    def plan_of(self, step: int) -> ChunkPlan:
        """The plan that `step` was served from.

        Raises:
            DataError: it has not been planned.
        """
        data_step = self.stream_version.data_step(step)
        at = bisect.bisect_right(self.plans, data_step, key=lambda plan: plan.first_step) - 1
        if at >= 0 and data_step < self.plans[at].first_step + self.plans[at].num_steps:
            return self.plans[at]
        raise DataError(f"Step {step} has not been planned; the journal ends before step {self.end}.")


class History:
    """The journal of a run, read back: which plan each step was served from in the end."""

    def __init__(self, path: Path) -> None:
        """Read the journal at `path`.

        Raises:
            DataError: there is none, or it is damaged.
        """
        if not path.is_file():
            raise DataError(f"{path} does not exist: this run has planned nothing yet.")
        self.attempts: list[AttemptRecord] = []
        for record in read_lines(path):
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "open":
            self.attempts.append(_attempt(record))
        elif record["kind"] == "chunk":
            self.attempts[-1].plans.append(_plan(record))
        elif record["kind"] == "close":
            self.attempts[-1] = dataclasses.replace(self.attempts[-1], next_step=record["next_step"])

    def attempt_of(self, step: int) -> AttemptRecord:
        """The attempt whose service of `step` counts: the last that began at or before it."""
        covering = [a for a in self.attempts if a.first_step <= step]
        if not covering:
            raise DataError(f"Step {step} was planned by no attempt.")
        return covering[-1]

    def plan_of(self, step: int) -> ChunkPlan:
        """The plan that `step` was served from.

        Raises:
            DataError: it has not been planned.
        """
        return self.attempt_of(step).plan_of(step)

    @property
    def end(self) -> int:
        """One past the last step of the run: served, or, where the last attempt was killed or goes on, planned."""
        return self.attempts[-1].served_end if self.attempts else 0

    def extents(self) -> list[tuple[AttemptRecord, range]]:
        """Every attempt with the steps whose service counts, in order; attempts without any are left out."""
        found, stop = [], self.end
        for attempt in reversed(self.attempts):
            steps = range(attempt.first_step, min(attempt.served_end, stop))
            stop = min(stop, attempt.first_step)
            if len(steps):
                found.append((attempt, steps))
        return found[::-1]


def _attempt(record: dict[str, Any]) -> AttemptRecord:
    return AttemptRecord(
        number=record["attempt"],
        first_step=record["first_step"],
        num_ranks=record["num_ranks"],
        model_parallel_size=record["model_parallel_size"],
        identity=record["identity"],
        stream_version=StreamVersion.from_dict(record["stream_version"]),
        plans=[],
        next_step=None,
    )


def _plan(record: dict[str, Any]) -> ChunkPlan:
    plan = ChunkPlan(
        chunk=record["chunk"],
        first_step=record["first_step"],
        num_steps=record["num_steps"],
        last=record["last"],
        cursors=np.array(record["cursors"], np.int64),
        lags=np.array(record["lags"], np.int64),
        weights=np.array(record["weights"], np.int64),
    )
    if plan.digest != record["digest"]:
        raise DataError(f"The journal's chunk {plan.chunk} is damaged: its digest does not match.")
    return plan
