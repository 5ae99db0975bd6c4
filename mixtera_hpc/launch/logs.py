"""Read the lines that ranks and the batch script wrote, over all attempts, each with its origin.

There is one file per rank. Beyond 255 ranks there is one file per node, whose lines srun labels with their rank. Users
of this module see no difference.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.attempts import read_end, read_start
from mixtera_hpc.launch.slurm.srun_reports import first_failed_rank

__all__ = ["LogTail", "RankSelection", "all_lines", "attempt_heading", "failed_rank_lines", "why_empty"]

RankSelection = int | Literal["all", "main"]
"""One rank; every rank; or `main`: rank 0, the batch script, and the last lines of the rank that failed first."""

NUM_FAILED_RANK_LINES = 20


@dataclass(slots=True)
class _ReadPosition:
    """Position up to which a file has been read."""

    offset: int = 0
    """Bytes."""
    incomplete: bytes = b""
    """The beginning of a line whose end is not written yet."""


class LogTail:
    """Read an attempt's logs from where the last call stopped. Price: one `stat` and one `read` per file and call."""

    def __init__(self, folder: Path, ranks: RankSelection) -> None:
        self._folder = folder
        self._ranks = ranks
        self._positions: dict[Path, _ReadPosition] = {}

    def lines(self, *, last: bool = False) -> list[str]:
        """Return the lines completed since the last call; with `last` also a final line without an end of line."""
        result = []
        for path in sorted(self._folder.glob("*.*")):
            source = _file_source(path)
            if source is None or not self._is_selected(source):
                continue
            for line in self._read(path, last=last):
                line_source, text = _split_label(source, line)
                if self._is_selected(line_source):
                    result.append(f"[{line_source}] {text}")
        return result

    def _read(self, path: Path, *, last: bool) -> list[str]:
        position = self._positions.setdefault(path, _ReadPosition())
        with path.open("rb") as file:
            file.seek(position.offset)
            data = file.read()

        position.offset += len(data)
        *lines, position.incomplete = (position.incomplete + data).split(b"\n")
        if last and position.incomplete:
            lines.append(position.incomplete)
            position.incomplete = b""
        return [line.decode(errors="replace") for line in lines]

    def _is_selected(self, source: str) -> bool:
        if self._ranks == "all" or source == "node":
            return True
        if self._ranks == "main":
            return source in ("0", "batch")
        return source == str(self._ranks)


def all_lines(folder: RunFolder, ranks: RankSelection) -> Iterator[str]:
    """Yield everything written so far, attempt by attempt, each below its heading."""
    for attempt in folder.attempts():
        lines = LogTail(folder.logs(attempt), ranks).lines(last=True)
        lines += failed_rank_lines(folder, attempt, ranks)
        if lines:
            yield attempt_heading(folder, attempt)
            yield from lines


def failed_rank_lines(folder: RunFolder, attempt: int, ranks: RankSelection) -> list[str]:
    """Return the last lines of the rank that failed first, if `ranks` is `main` and that rank is not rank 0."""
    failed = first_failed_rank(folder, attempt) if ranks == "main" else None
    if failed is None or failed.rank == 0:
        return []
    return LogTail(folder.logs(attempt), failed.rank).lines(last=True)[-NUM_FAILED_RANK_LINES:]


def attempt_heading(folder: RunFolder, attempt: int) -> str:
    """Return the line above an attempt's lines."""
    start = read_start(folder, attempt)
    job = f" · job {start.job_id}" if start and start.job_id else ""
    return f"--- {folder.run_id} · attempt {attempt}{job}"


def why_empty(folder: RunFolder, ranks: RankSelection) -> str:
    """Return why a run has no log lines, and what to do. Call it only if `all_lines` yields nothing."""
    attempt = max(folder.attempts(), default=0)
    start = read_start(folder, attempt)
    if start is None or start.kind != "slurm":
        return (
            "A run that was started with mixtera-hpc run, also under mpiexec, writes to its terminal only.\n"
            f"  See its state with mixtera-hpc status {folder.run_id}"
        )
    files = [path for path in folder.logs(attempt).glob("*.*") if _file_source(path) in (str(ranks), "node")]
    if files:
        return (
            f"{', '.join(map(str, sorted(files)))}: empty. Ranks other than 0 write only warnings and errors.\n"
            f"  See all ranks with mixtera-hpc logs {folder.run_id} --rank all"
        )
    if read_end(folder, attempt) is None:
        return (
            f"Job {start.job_id} of attempt {attempt} has written nothing: it waits in the queue, or its ranks have "
            f"not started yet.\n  See mixtera-hpc status {folder.run_id}"
        )
    return (
        f"Attempt {attempt} ended before its ranks started, or its logs were removed.\n"
        f"  See the batch script's lines with mixtera-hpc logs {folder.run_id}"
    )


def _file_source(path: Path) -> str | None:
    """Return `batch`, a rank's number, or `node` for a file of labelled lines; None for any other file."""
    if path.name == "batch.out":
        return "batch"
    match = re.fullmatch(r"(rank|node)_(\d+)\.(?:out|err)", path.name)
    if not match:
        return None
    kind, number = match.groups()
    return str(int(number)) if kind == "rank" else "node"


def _split_label(source: str, line: str) -> tuple[str, str]:
    """Return the origin and the text of a line; a line without srun's label belongs to all ranks of the node."""
    if source != "node":
        return source, line
    match = re.match(r"\s*(\d+): ?(.*)", line)
    return (match.group(1), match.group(2)) if match else ("all", line)
