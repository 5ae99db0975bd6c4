"""The number of ranks and the time limit of a job, computed from its configuration."""

import re

from mixtera_hpc.config.schema import Config

__all__ = ["num_ranks", "parse_time"]


def num_ranks(config: Config) -> int:
    """Return the number of ranks of the whole job."""
    return config.job.nodes * (config.job.ranks_per_node or config.cluster.ranks_per_node)


def parse_time(text: str) -> int | None:
    """Return the seconds of a Slurm time `HH:MM:SS` or `D-HH:MM:SS`, or None if `text` is neither."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
