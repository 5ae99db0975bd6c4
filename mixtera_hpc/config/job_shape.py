"""The number of ranks, the time limit, the interpreter and other facts of a job, computed from its configuration."""

import re
import sys

from mixtera_hpc.config.schema import ClusterConfig, Config, JobConfig

__all__ = [
    "SCALE_KEYS",
    "can_start",
    "cpus_per_rank",
    "mpi_plugin",
    "num_ranks",
    "parse_time",
    "python_of_ranks",
    "signal_lead_s",
]

SCALE_KEYS = ("job.nodes", "job.ranks_per_node")
"""The keys that a scaling sweep varies, and in which runs of one comparison may differ."""


def num_ranks(config: Config) -> int:
    """Return the number of ranks of the whole job."""
    return config.job.nodes * (config.job.ranks_per_node or config.cluster.ranks_per_node)


def cpus_per_rank(config: Config) -> int | None:
    """Return the cores of each rank of the job, or None if the configuration of the cluster does not say."""
    if config.job.cpus_per_rank is not None or config.cluster.cpus_per_node is None:
        return config.job.cpus_per_rank
    ranks_per_node = num_ranks(config) // config.job.nodes
    return max(1, config.cluster.cpus_per_node // ranks_per_node)


def parse_time(text: str) -> int | None:
    """Return the seconds of a Slurm time `HH:MM:SS` or `D-HH:MM:SS`, or None if `text` is neither."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def signal_lead_s(job: JobConfig, cluster: ClusterConfig) -> int:
    """Return the seconds before the time limit at which the job is asked to save."""
    if job.signal_lead_s is not None:
        return job.signal_lead_s
    return min(cluster.signal_lead_s, (parse_time(job.time) or 0) // 3)


def can_start(cluster: ClusterConfig, environment: str) -> bool:
    """Return True if srun of the cluster can start ranks in an environment of this kind."""
    flags = {"uenv": cluster.uenv_flag, "container": cluster.container_flag}
    return environment not in flags or flags[environment] is not None


def python_of_ranks(config: Config) -> str:
    """Return the interpreter that the ranks of a job start, as a path or a name that their shell looks up."""
    environment = config.environment
    if environment.python is not None:
        return environment.python
    if environment.venv is not None:
        return f"{environment.venv}/bin/python"
    # A uenv or a container has its own interpreter.
    return "python" if environment.kind in ("uenv", "container") else sys.executable


def mpi_plugin(config: Config) -> str | None:
    """Return the value of `srun --mpi`; None leaves the choice to Slurm."""
    if config.environment.mpi is not None:
        return config.environment.mpi
    if config.environment.kind == "container" and config.cluster.container_mpi is not None:
        return config.cluster.container_mpi
    return config.cluster.mpi
