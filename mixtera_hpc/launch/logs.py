"""The lines that ranks and the batch script wrote, over all attempts, each with where it came from.

One file per rank, or beyond 255 ranks one per node whose lines srun labelled; whoever reads sees no difference.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.attempts import read_start

__all__ = ["LogTail", "RankSelection", "all_lines", "attempt_heading", "failed_rank_lines"]

RankSelection = int | Literal["all", "main"]
"""One rank; everything; or `main`: rank 0 and the batch script, and the last words of the rank that failed first."""

LAST_WORDS = 20
"""Lines."""


@dataclass(slots=True)
class _Position:
    """How far a file has been read."""

    offset: int = 0
    rest: bytes = b""
    """The beginning of a line whose end is not written yet."""


class LogTail:
    """Reads an attempt's logs from where it last stopped; costs one `stat` and `read` per file and call."""

    def __init__(self, folder: Path, ranks: RankSelection) -> None:
        self._folder = folder
        self._ranks = ranks
        self._positions: dict[Path, _Position] = {}

    def lines(self, *, last: bool = False) -> list[str]:
        """Complete lines written since the last call; with `last` also what has no end of line."""
        found = []
        for path in sorted(self._folder.glob("*.*")):
            source = _source(path)
            if source is None or not self._wanted(source):
                continue
            for line in self._read(path, last=last):
                labelled = _labelled(source, line)
                if labelled is not None and self._wanted(labelled[0]):
                    found.append(f"[{labelled[0]}] {labelled[1]}")
        return found

    def _read(self, path: Path, *, last: bool) -> list[str]:
        at = self._positions.setdefault(path, _Position())
        with path.open("rb") as file:
            file.seek(at.offset)
            data = file.read()
        at.offset += len(data)
        *lines, at.rest = (at.rest + data).split(b"\n")
        if last and at.rest:
            lines.append(at.rest)
            at.rest = b""
        return [line.decode(errors="replace") for line in lines]

    def _wanted(self, source: str) -> bool:
        if self._ranks == "all" or source == "node":
            return True
        if self._ranks == "main":
            return source in ("0", "batch")
        return source == str(self._ranks)


def all_lines(folder: RunFolder, ranks: RankSelection) -> Iterator[str]:
    """Everything written so far, attempt by attempt, each under its heading."""
    for attempt in folder.attempts():
        lines = LogTail(folder.logs(attempt), ranks).lines(last=True) + failed_rank_lines(folder, attempt, ranks)
        if lines:
            yield attempt_heading(folder, attempt)
            yield from lines


def failed_rank_lines(folder: RunFolder, attempt: int, ranks: RankSelection) -> list[str]:
    """With `main`, the last lines of the rank that failed, where that is not rank 0.

    srun kills the others when one leaves with a code of its own, and tells all of them in any order.
    """
    batch = folder.logs(attempt) / "batch.out"
    if ranks != "main" or not batch.is_file():
        return []
    ended = re.findall(r"srun: error: \S+: tasks? (\d+)\S* (.*)", batch.read_text(errors="replace"))
    by_themselves = [int(rank) for rank, how in ended if how.startswith("Exited with")]
    rank = next(iter(by_themselves or (int(rank) for rank, _ in ended)), 0)
    return LogTail(folder.logs(attempt), rank).lines(last=True)[-LAST_WORDS:] if rank else []


def attempt_heading(folder: RunFolder, attempt: int) -> str:
    """The line above an attempt's lines."""
    start = read_start(folder, attempt)
    job = f" · job {start.job_id}" if start and start.job_id else ""
    return f"--- {folder.run_id} · attempt {attempt}{job}"


def _source(path: Path) -> str | None:
    """`batch`, a rank's number, or `node` for a file of labelled lines; None for any other file."""
    if path.name == "batch.out":
        return "batch"
    match = re.fullmatch(r"(rank|node)_(\d+)\.(?:out|err)", path.name)
    if not match:
        return None
    return str(int(match.group(2))) if match.group(1) == "rank" else "node"


def _labelled(source: str, line: str) -> tuple[str, str] | None:
    if source != "node":
        return source, line
    match = re.match(r"\s*(\d+): ?(.*)", line)
    return (match.group(1), match.group(2)) if match else ("all", line)
