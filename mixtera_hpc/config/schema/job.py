"""Settings of the groups `job`, `cluster` and `environment`: what a job requests, the nodes, and their software."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mixtera_hpc.config.schema.composed_default import composed_from

__all__ = ["ClusterConfig", "EnvironmentConfig", "JobConfig", "PartitionConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Resources that the job requests from Slurm."""

    name: str | None = None
    """Job name. Null means `run.name`."""
    nodes: int = 1
    """Number of nodes."""
    ranks_per_node: int | None = composed_from("${cluster.ranks_per_node}", default=None)
    """Processes per node; one per GPU on a cluster with GPUs."""
    time: str = "01:00:00"
    """Time limit, as `HH:MM:SS` or `D-HH:MM:SS`. Put it in quotes in a YAML file."""
    account: str | None = None
    """Slurm account that is charged. Required where `cluster.needs_account` is true."""
    partition: str | None = composed_from("${cluster.partition}", default=None)
    """Slurm partition. Null means the default partition of Slurm."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Slurm constraint: features that the nodes must have, for example `gpu&hbm80g`."""
    reservation: str | None = None
    """Slurm reservation to run in."""
    cpus_per_rank: int | None = None
    """Cores per rank. Null divides the cores of a node (`cluster.cpus_per_node`) by its ranks."""
    mem: str | None = composed_from("${cluster.mem}", default=None)
    """Memory per node in Slurm's units, for example `460000` (MB) or `200G`. Null means the default of Slurm."""
    signal_lead_s: int | None = None
    """Seconds before the time limit at which the job is asked to save. At most a third of `job.time`. Null means
    `cluster.signal_lead_s`, or a third of `job.time` if that is less."""
    max_attempts: int = 10
    """Largest number of jobs in a chain. A job that saved, failed or lost a node is followed by the next one, until the
    run is complete, or two jobs in a row made no new checkpoint."""
    heartbeat_s: float = 5
    """Seconds between two signs of life of a node. A node that is silent for three of them is reported as lost. 1 to
    3600."""
    comment: str | None = None
    """Comment that Slurm stores with the job."""
    exclude: str | None = None
    """Nodes that the job must not use, in Slurm's notation, for example `nid[001-004]`."""
    dependency: str | None = None
    """Slurm dependency, for example `afterok:4711`."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun, after those of the cluster."""
    command: list[str] | None = None
    """Words of the command that every rank executes instead of the reference trainer. It gets the run folder and the
    number of the attempt in the environment variables `MIXTERA_RUN_FOLDER` and `MIXTERA_ATTEMPT`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionConfig:
    """Limits of one partition. Null means the limit of the cluster."""

    max_nodes: int | None = None
    """Largest number of nodes per job."""
    max_time: str | None = None
    """Longest time limit, as `HH:MM:SS` or `D-HH:MM:SS`."""
    max_node_minutes: int | None = None
    """Largest product of nodes and minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Properties of the nodes of a cluster, and the way in which ranks are started on them."""

    name: str = "local"
    """Name of the cluster, for messages."""
    ranks_per_node: int = 1
    """Default of `job.ranks_per_node`."""
    gpus_per_node: int = 0
    """GPUs of a node, and the largest value of `job.ranks_per_node`. With 0 ranks are not bound to GPUs."""
    gpu_request: Literal["gpus-per-task", "gpus-per-node", "gres"] = "gpus-per-task"
    """Form of a request for GPUs to Slurm: one per rank, all of a node, or all of a node as a generic resource."""
    cpus_per_node: int | None = None
    """Cores of a node that ranks may use. Null: not known and not checked."""
    max_nodes: int | None = None
    """Largest number of nodes per job. Null: not checked."""
    max_time: str | None = None
    """Longest time limit, as `HH:MM:SS` or `D-HH:MM:SS`. Null: not checked."""
    mem: str | None = None
    """Default of `job.mem`."""
    partition: str | None = None
    """Default of `job.partition`."""
    partitions: dict[str, PartitionConfig] = field(default_factory=dict)
    """Partitions of the cluster and their limits. An empty mapping is not checked."""
    needs_account: bool = False
    """Require that `job.account` is given."""
    mpi: str | None = None
    """Value of `srun --mpi`, for example `pmix`. Null means the default of Slurm. `environment.mpi` replaces it."""
    signal_lead_s: int = 120
    """Default of `job.signal_lead_s`."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further `#SBATCH` parameters, which keys of `job` may replace: parameter → value, true for a flag without a
    value, null to remove one that would be written otherwise."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank, taken literally. Write values that the shell has to expand into
    `cluster.setup`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script that run before srun."""
    wrapper: list[str] = field(default_factory=list)
    """Words between srun and the Python interpreter, for example `[numactl, --membind=0-3]`."""
    container_flag: str | None = None
    """Flag of srun that takes the image of `environment=container`. Null: srun cannot start containers."""
    uenv_flag: str | None = None
    """Flag of srun that takes the image of `environment=uenv`. Null: the cluster has no uenvs."""
    container_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank in a container, beside `cluster.env`."""
    container_mpi: str | None = None
    """Default of `environment.mpi` in a container."""
    network_latency_us: float = 5.0
    """Time of a small message between two nodes, in microseconds; for `report --scaling --model` only. Above 0."""
    network_gb_per_s: float = 10.0
    """Network bandwidth of one rank, in GB/s; for `report --scaling --model` only. Above 0."""
    metadata_ops_per_s: float = 10_000.0
    """Metadata operations that the shared file system answers per second, for `report --scaling --model` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig:
    """The Python interpreter and packages of the ranks of a job."""

    kind: Literal["none", "venv", "uenv", "container"] = "none"
    """The interpreter that submits, a virtual environment, a uenv of CSCS, or a container that srun starts."""
    image: str | None = None
    """The uenv (`pytorch/v2.9.1:v2`), or the value of `cluster.container_flag`: an environment file or an image."""
    view: str | None = None
    """View of the uenv."""
    venv: str | None = None
    """Folder of a virtual environment that all nodes see; also one inside of the uenv or the container."""
    python: str | None = None
    """Python interpreter on the compute nodes. Null means that of `environment.venv`, `python` in a uenv or container,
    else the interpreter that submits."""
    mpi: str | None = None
    """Value of `srun --mpi` in this environment. Null means `cluster.container_mpi` in a container, else
    `cluster.mpi`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script that run before srun and after those of the cluster, for example
    `module load Python`."""
