"""Read from the log of a batch script which rank srun reports as failed first, and what that rank printed last.

A rank that is reported with its own exit code failed by itself; srun killed the ranks that it reports as killed.
"""

import re
from dataclasses import dataclass

from mixtera_hpc.config.run_folder import RunFolder

__all__ = ["FailedRank", "first_failed_rank", "lost_node", "mpi_problem"]

_MPI_CURES = {
    "unsupported PMI version": "the MPI library and the --mpi of srun do not fit",
    "PMI was not built": "the MPI library and the --mpi of srun do not fit",
    "Invalid MPI type": "this Slurm does not have that value of srun --mpi",
    "build Open MPI using --with-pmi": "the MPI library and the --mpi of srun do not fit",
    "has no PMI support": "the MPI library and the --mpi of srun do not fit",
    "but the data plane sees 1": "the ranks do not see each other: the MPI library and the --mpi of srun do not fit",
}
"""Messages of MPI libraries, srun and our launcher if `--mpi` is wrong → their meaning."""

TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRank:
    """The rank that srun reports first."""

    rank: int
    host: str
    report: str
    """srun's words, for example `Exited with exit code 3`."""
    last_line: str = ""
    """The last line that the rank printed."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.last_line or self.report}"


def first_failed_rank(folder: RunFolder, attempt: int) -> FailedRank | None:
    """Return the rank that failed first; None if srun reports none."""
    reports = re.findall(r"srun: error: (\S+): tasks? (\d+)\S* (.*)", _tail(folder, attempt, "batch.out"))
    own = [report for report in reports if report[2].lstrip(": ").startswith("Exited with")] or reports
    if not own:
        return None
    host, rank, report = own[0]
    files = [_tail(folder, attempt, f"rank_{int(rank):05d}.{kind}") for kind in ("out", "err")]
    errors = [line.strip() for text in files for line in text.splitlines() if line.strip()]
    return FailedRank(rank=int(rank), host=host, report=report.lstrip(": "), last_line=errors[-1] if errors else "")


def lost_node(folder: RunFolder, attempt: int) -> str | None:
    """Return what srun or the batch shell reports about a lost node or a killed srun; None if nothing."""
    text = _tail(folder, attempt, "batch.out")
    if found := re.search(r"srun: error: Node failure on (\S+)", text):
        return f"node {found.group(1)} was lost"
    return "srun was killed" if re.search(r"line \d+: +\d+ Killed +srun ", text) else None


def mpi_problem(folder: RunFolder, attempt: int) -> str | None:
    """Return what is wrong with `srun --mpi` and its cure; None if the logs do not complain about it."""
    failed = first_failed_rank(folder, attempt)
    ranks = {0, failed.rank if failed else 0}
    names = ["batch.out", *(f"rank_{rank:05d}.{kind}" for rank in ranks for kind in ("err", "out"))]
    text = "".join(_tail(folder, attempt, name) for name in names)
    for words, meaning in _MPI_CURES.items():
        if words in text:
            return (
                f"{meaning}. List the choices with srun --mpi=list, set cluster.mpi (in a container environment.mpi) "
                "to the one of your MPI library (MPICH: pmi2, Open MPI 5: pmix), and check it with mixtera-hpc doctor"
            )
    return None


def _tail(folder: RunFolder, attempt: int, name: str) -> str:
    try:
        with (folder.logs(attempt) / name).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
