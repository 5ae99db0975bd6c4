"""Find problems of the groups `job` and `cluster` that can be seen without asking Slurm."""

import re

from mixtera_hpc.config.check_numbers import at_least
from mixtera_hpc.config.job_shape import parse_time
from mixtera_hpc.config.schema import ClusterConfig, JobConfig, PartitionConfig
from mixtera_hpc.errors import did_you_mean

__all__ = ["job_problems"]


def job_problems(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    """Return everything wrong with a job on this cluster, one or two sentences each."""
    return [
        *at_least("job.nodes", job.nodes, 1),
        *at_least("job.max_attempts", job.max_attempts, 1),
        *_words(job),
        *_time(job, cluster),
        *_node_shape(job, cluster),
        *_partition(job, cluster),
        *_container(job, cluster),
    ]


def _words(job: JobConfig) -> list[str]:
    problems = []
    if job.cpus_per_rank is not None:
        problems += at_least("job.cpus_per_rank", job.cpus_per_rank, 1)
    if job.mem is not None and not re.fullmatch(r"\d+[KMGT]?", job.mem, re.ASCII | re.IGNORECASE):
        problems.append(f"job.mem is {job.mem!r}, expected a number of megabytes, or a number with K, M, G or T.")
    if job.command is not None and not any(job.command):
        problems.append("job.command is empty. Give the words of a command, or leave it out to train with ours.")
    return problems


def _time(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    seconds = parse_time(job.time)
    if seconds is None:
        return [
            f"job.time is {job.time!r}, expected HH:MM:SS or D-HH:MM:SS, e.g. job.time=12:30:00 (in a file in quotes)."
        ]
    return _signal_lead(job, seconds) + _limits(job, cluster, seconds)


def _signal_lead(job: JobConfig, seconds: int) -> list[str]:
    if job.signal_lead_s * 3 <= seconds:
        return at_least("job.signal_lead_s", job.signal_lead_s, 1)
    return [
        f"job.signal_lead_s is {job.signal_lead_s}, more than a third of job.time={job.time}. Lower it or ask for more "
        "time."
    ]


def _limits(job: JobConfig, cluster: ClusterConfig, seconds: int) -> list[str]:
    """Compare with the limits of the partition, or of the cluster where the partition has none."""
    partition = job.partition or cluster.partition
    limits = cluster.partitions.get(partition or "", PartitionConfig())
    where = f"partition {partition} of cluster" if limits != PartitionConfig() else "cluster"
    problems = []

    max_time = limits.max_time or cluster.max_time
    max_seconds = parse_time(max_time) if max_time else None
    if max_seconds is not None and seconds > max_seconds:
        problems.append(f"job.time is {job.time}, {where} {cluster.name!r} allows at most {max_time}.")

    max_nodes = limits.max_nodes or cluster.max_nodes
    if max_nodes is not None and job.nodes > max_nodes:
        problems.append(f"job.nodes is {job.nodes}, {where} {cluster.name!r} has at most {max_nodes} per job.")

    if limits.max_node_minutes is not None and job.nodes * seconds > limits.max_node_minutes * 60:
        problems.append(
            f"job.nodes × job.time is {job.nodes * seconds / 60:g} node-minutes, {where} {cluster.name!r} allows "
            f"at most {limits.max_node_minutes}."
        )
    return problems


def _node_shape(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    ranks = cluster.ranks_per_node if job.ranks_per_node is None else job.ranks_per_node
    if ranks < 1:
        return at_least("job.ranks_per_node", ranks, 1)
    problems = []
    if cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        problems.append(
            f"job.ranks_per_node is {ranks}, but cluster {cluster.name!r} has {cluster.gpus_per_node} GPUs per node; "
            f"one rank per GPU is the rule. Set job.ranks_per_node={cluster.gpus_per_node} or fewer."
        )
    cores = ranks * (job.cpus_per_rank or 1)
    if cluster.cpus_per_node is not None and cores > cluster.cpus_per_node:
        problems.append(
            f"job.ranks_per_node × job.cpus_per_rank is {cores}, but a node of cluster {cluster.name!r} has "
            f"{cluster.cpus_per_node} cores. Lower one of them."
        )
    return problems


def _partition(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    if not cluster.partitions or job.partition is None or job.partition in cluster.partitions:
        return []
    near = did_you_mean(job.partition, list(cluster.partitions))
    return [f"job.partition={job.partition} is not one of cluster {cluster.name!r}.{near}"]


def _container(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    if job.container is None or cluster.container_flag is not None:
        return []
    return [
        f"job.container is set, but cluster {cluster.name!r} has no cluster.container_flag. "
        "Give srun's flag for containers there, or put the container's exec into cluster.wrapper."
    ]
