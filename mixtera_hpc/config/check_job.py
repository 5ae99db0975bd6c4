"""Find problems of the groups `job`, `cluster` and `environment` that can be seen without asking Slurm."""

import re

from mixtera_hpc.config.check_numbers import all_at_least, at_least
from mixtera_hpc.config.job_shape import can_start, parse_time
from mixtera_hpc.config.schema import ClusterConfig, EnvironmentConfig, JobConfig, PartitionConfig
from mixtera_hpc.errors import did_you_mean

__all__ = ["environment_problems", "job_problems"]

MAX_HEARTBEAT_S = 3600
"""A lost node would cost three hours."""


def job_problems(job: JobConfig, cluster: ClusterConfig, environment: EnvironmentConfig) -> list[str]:
    """Return everything wrong with a job on this cluster in this environment, one or two sentences each."""
    return [
        *at_least("job.nodes", job.nodes, 1),
        *at_least("job.max_attempts", job.max_attempts, 1),
        *_heartbeat(job),
        *at_least("cluster.gpus_per_node", cluster.gpus_per_node, 0),
        *all_at_least("cluster", cluster, 1, ("ranks_per_node", "cpus_per_node", "max_nodes")),
        *_words(job),
        *_time(job, cluster),
        *_node_shape(job, cluster),
        *_partition(job, cluster),
        *_network(cluster),
        *environment_problems(environment, cluster),
    ]


def _heartbeat(job: JobConfig) -> list[str]:
    if 1 <= job.heartbeat_s <= MAX_HEARTBEAT_S:
        return []
    return [f"job.heartbeat_s is {job.heartbeat_s}, expected 1 to {MAX_HEARTBEAT_S} seconds."]


def _network(cluster: ClusterConfig) -> list[str]:
    values = {
        "cluster.network_latency_us": cluster.network_latency_us,
        "cluster.network_gb_per_s": cluster.network_gb_per_s,
        "cluster.metadata_ops_per_s": cluster.metadata_ops_per_s,
    }
    return [
        f"{key} is {value}, expected a number above 0." for key, value in values.items() if not 0 < value < float("inf")
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
    return _signal_lead(job, cluster, seconds) + _limits(job, cluster, seconds)


def _signal_lead(job: JobConfig, cluster: ClusterConfig, seconds: int) -> list[str]:
    if job.signal_lead_s is None:
        # The default of the cluster is shortened to a third of job.time.
        return at_least("cluster.signal_lead_s", cluster.signal_lead_s, 1)
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


def environment_problems(environment: EnvironmentConfig, cluster: ClusterConfig) -> list[str]:
    """Return missing settings, settings of another kind of environment, and flags that the cluster lacks."""
    kind = environment.kind
    needed = {"venv": "venv", "uenv": "image", "container": "image"}.get(kind)
    problems = []
    if needed is not None and not getattr(environment, needed):
        example = {"venv": "$SCRATCH/venv", "uenv": "pytorch/v2.9.1:v2", "container": "/path/to/environment.toml"}[kind]
        problems.append(f"environment={kind} needs environment.{needed}, for example environment.{needed}={example}.")
    if environment.image and kind not in ("uenv", "container"):
        problems.append(
            f"environment.image is set, but environment={kind} has none. Add environment=container or uenv."
        )
    if environment.view and kind != "uenv":
        problems.append(
            f"environment.view is set, but only a uenv has views, and environment.kind is {kind}. Remove it, or add "
            "environment=uenv."
        )
    return problems + _srun_flag(kind, cluster)


def _srun_flag(kind: str, cluster: ClusterConfig) -> list[str]:
    if can_start(cluster, kind):
        return []
    other = "" if kind == "uenv" else ", or put the words that start the container into cluster.wrapper"
    return [
        f"environment={kind} needs a flag of srun, but cluster {cluster.name!r} has no cluster.{kind}_flag. "
        f"Set it if srun has such a flag{other}."
    ]
