"""Restrict the output of `trace` to the sequences of one rank."""

from collections.abc import Iterable

from mixtera_hpc.dataplane.recording.run_history import AttemptRecord
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace.served_run import Record

__all__ = ["check_rank", "is_served_to"]


def check_rank(rank: int | None, attempts: Iterable[AttemptRecord]) -> None:
    """Refuse a rank that none of `attempts` had; None stands for all ranks.

    Raises:
        ConfigError: names the valid ranks.
    """
    num_ranks = max((attempt.num_ranks for attempt in attempts), default=0)
    if rank is not None and num_ranks and not 0 <= rank < num_ranks:
        raise ConfigError(
            f"--rank is {rank}, but these steps were served to {num_ranks} ranks.\n  Give one of 0 to {num_ranks - 1}."
        )


def is_served_to(rank: int | None, attempt: AttemptRecord, record: Record) -> bool:
    """Return True if `rank`, or a rank of its model-parallel group, was served the sequence of `record`.

    Records name the first rank of a group. Every rank of the group receives the same batch.
    """
    if rank is None:
        return True
    return bool(rank < attempt.num_ranks and attempt.leader_of(rank) == record["rank"])
