"""One pass over a `Config` that lists everything wrong with it. Needs no cluster, no MPI, no index."""

import keyword
import re

from mixtera_hpc.config.check_mixture import mixture_problems
from mixtera_hpc.config.convert import raise_problems
from mixtera_hpc.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    DataPlaneConfig,
    JobConfig,
    MixtureConfig,
    PartitionConfig,
    PlanConfig,
    PropertyConfig,
    QueryConfig,
    RunConfig,
    TrainingConfig,
)
from mixtera_hpc.errors import did_you_mean

__all__ = ["check", "check_data", "check_index_job", "holdout_problems", "num_ranks", "parse_time", "problems"]


def check(config: Config) -> None:
    """Raise one ConfigError naming every problem of `config`."""
    raise_problems(problems(config))


def check_data(config: Config) -> None:
    """`check` for verbs that look at data and index only: nothing of a run is asked for."""
    raise_problems([*_index(config), *holdout_problems(config.query), *mixture_problems(config.mixture)])


def check_index_job(config: Config) -> None:
    """`check` for a job that works on an index: nothing of the data plane is asked for."""
    raise_problems([*_index(config), *_run(config.run), *_job(config.job, config.cluster)])


def problems(config: Config) -> list[str]:
    """Everything wrong with `config`, one sentence or two each."""
    return [
        *_index(config),
        *mixture_problems(config.mixture),
        *holdout_problems(config.query),
        *_dataplane(config.dataplane, config.mixture),
        *_training(config.training),
        *_validation(config),
        *_run(config.run),
        *_plan(config.plan),
        *_job(config.job, config.cluster),
        *_batch_split(config),
    ]


def holdout_problems(query: QueryConfig) -> list[str]:
    """Whether a side of the split can be served."""
    found = []
    if not 0 <= query.holdout.fraction < 1:
        found.append(f"query.holdout.fraction is {query.holdout.fraction}, expected at least 0 and less than 1.")
    if query.split == "validation" and not query.holdout.fraction:
        found.append("query.split=validation, but nothing is held out. Set query.holdout.fraction, e.g. to 0.01.")
    return found


def _validation(config: Config) -> list[str]:
    if config.query.holdout.fraction or not config.training.validate_every:
        return []
    return ["training.validate_every is set, but nothing is held out. Set query.holdout.fraction, e.g. to 0.01."]


def num_ranks(config: Config) -> int:
    """Ranks of the whole job."""
    return config.job.nodes * (config.job.ranks_per_node or config.cluster.ranks_per_node)


def parse_time(text: str) -> int | None:
    """Seconds of a Slurm time `HH:MM:SS` or `D-HH:MM:SS`; None when it is neither."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(g or 0) for g in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _index(config: Config) -> list[str]:
    found = [*_roots(config.data), *_at_least("index.block_rows", config.index.block_rows, 1)]
    found += _at_least("index.threads", config.index.threads, 1)
    found += _at_least("data.max_block_bytes", config.data.max_block_bytes, 1 << 16)
    found += _vocabulary(config.dataplane)
    for name, spec in config.data.properties.items():
        found += [*_pattern(name, spec.pattern), *_origin_of_values(name, spec)]
        if not name.isidentifier() or keyword.iskeyword(name) or name == "null":
            found.append(
                f"data.properties.{name} is not a usable name. Use letters, digits and _, and no keyword of Python."
            )
    return found


def _roots(data: DataConfig) -> list[str]:
    found = [] if data.root or data.sets else ["data.root is missing. Set it on the command line or in a config file."]
    for name, root in data.sets.items():
        if not name or not root:
            found.append(f"data.sets has {name!r}: {root!r}, expected a name and a folder.")
    if data.sets and "dataset" in data.properties:
        found.append("data.properties.dataset is the name of the root with data.sets. Give the property another name.")
    return found


def _origin_of_values(name: str, spec: PropertyConfig) -> list[str]:
    if (spec.path is None) == (spec.function is None):
        return [f"data.properties.{name} needs either a path in the row or a function over documents."]
    if spec.function is not None and spec.pattern is not None:
        return [f"data.properties.{name} has a function and a pattern. Let the function return what the pattern takes."]
    return []


def _vocabulary(plane: DataPlaneConfig) -> list[str]:
    found = []
    if plane.vocab_size is not None and not 1 <= plane.vocab_size < 1 << 31:
        found.append(f"dataplane.vocab_size is {plane.vocab_size}, expected 1 to 2**31 - 1.")
    if plane.vocab_size is not None and plane.tokenizer is not None:
        found.append(
            "dataplane.vocab_size and dataplane.tokenizer are both set. Leave out the size: the tokenizer has it."
        )
    if plane.eos_id is not None and not 0 <= plane.eos_id < (plane.vocab_size or 0):
        found.append(
            f"dataplane.eos_id is {plane.eos_id}, expected an id below dataplane.vocab_size={plane.vocab_size}. With a "
            "tokenizer, name its token with dataplane.eos_token."
        )
    return found


def _pattern(name: str, pattern: str | None) -> list[str]:
    try:
        re.compile(pattern or "")
    except re.error as error:
        return [f"data.properties.{name}.pattern is {pattern!r}, which is no regular expression: {error}."]
    return []


def _dataplane(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    found = []
    for name in (
        "seq_len",
        "global_batch_size",
        "chunk_steps",
        "shuffle_window",
        "prefetch_batches",
        "model_parallel_size",
    ):
        found += _at_least(f"dataplane.{name}", getattr(plane, name), 1)
    found += _at_least("dataplane.feedback_lag", plane.feedback_lag, 2)
    found += _at_least("dataplane.workers", plane.workers, 0)
    if plane.chunk_steps * plane.global_batch_size > 1_000_000:
        found.append(
            f"dataplane.chunk_steps × dataplane.global_batch_size is {plane.chunk_steps * plane.global_batch_size}, "
            "at most 1000000 sequences fit in one chunk. Lower dataplane.chunk_steps."
        )
    if mixture.kind == "arbitrary" and plane.shuffle != "none":
        found.append(
            f"mixture.kind=arbitrary serves samples in index order, but dataplane.shuffle is {plane.shuffle}. Set "
            "dataplane.shuffle=none, or mixture.kind=natural."
        )
    if not 0 <= plane.seed < 2**63:
        found.append(f"dataplane.seed is {plane.seed}, expected 0 to 2**63 - 1.")
    if mixture.unit == "tokens" and plane.tokenizer is None and plane.vocab_size is None:
        found.append(
            "dataplane.tokenizer is not set, but mixture.unit=tokens counts tokens. Give a tokenizer.json, dataplane.vocab_size "
            "where all shards hold token ids, or set mixture.unit=samples."
        )
    return found


def _training(training: TrainingConfig) -> list[str]:
    found = []
    for name in (
        "num_steps",
        "num_layers",
        "num_heads",
        "embedding_dim",
        "num_threads",
        "keep_checkpoints",
        "log_every",
        "validate_steps",
    ):
        found += _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("micro_batch_size", "stop_after"):
        if getattr(training, name) is not None:
            found += _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("warmup_steps", "checkpoint_every", "validate_every", "weight_decay"):
        found += _at_least(f"training.{name}", getattr(training, name), 0)
    if not -(2**63) <= training.seed < 2**63:
        found.append(f"training.seed is {training.seed}, expected a number of 64 bits.")
    for name in ("learning_rate", "grad_clip"):
        if not getattr(training, name) > 0:
            found.append(f"training.{name} is {getattr(training, name)}, expected more than 0.")
    if training.embedding_dim % max(2 * training.num_heads, 1):
        found.append(
            f"training.embedding_dim is {training.embedding_dim}, expected a multiple of 2 × training.num_heads="
            f"{training.num_heads}: rotary positions turn pairs of numbers."
        )
    return found


def _plan(plan: PlanConfig) -> list[str]:
    steps = [] if plan.steps is None else _at_least("plan.steps", plan.steps, 1)
    return [*_at_least("plan.first_step", plan.first_step, 0), *steps]


def _run(run: RunConfig) -> list[str]:
    named = {"run.name": run.name, "run.id": run.id}
    return [
        f"{key} is {value!r}, which cannot name a folder. Use letters, digits, '.', '_' and '-'."
        for key, value in named.items()
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value)
    ]


def _job(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    found = _at_least("job.nodes", job.nodes, 1) + _at_least("job.max_attempts", job.max_attempts, 1)
    seconds = parse_time(job.time)
    if seconds is None:
        found.append(
            f"job.time is {job.time!r}, expected HH:MM:SS or D-HH:MM:SS, e.g. job.time=12:30:00 (in a file in quotes)."
        )
    else:
        found += _signal_lead(job, seconds) + _limits(job, cluster, seconds)
    found += _node_shape(job, cluster)
    partition = job.partition
    if cluster.partitions and partition is not None and partition not in cluster.partitions:
        found.append(
            f"job.partition={partition} is not one of cluster {cluster.name!r}."
            f"{did_you_mean(partition, list(cluster.partitions))}"
        )
    if job.container is not None and cluster.container_flag is None:
        found.append(
            f"job.container is set, but cluster {cluster.name!r} has no cluster.container_flag. "
            "Give srun's flag for containers there, or put the container's exec into cluster.wrapper."
        )
    return found


def _node_shape(job: JobConfig, cluster: ClusterConfig) -> list[str]:
    ranks = job.ranks_per_node if job.ranks_per_node is not None else cluster.ranks_per_node
    if ranks < 1:
        return _at_least("job.ranks_per_node", ranks, 1)
    found = []
    if cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        found.append(
            f"job.ranks_per_node is {ranks}, but cluster {cluster.name!r} has {cluster.gpus_per_node} GPUs per node; "
            f"one rank per GPU is the rule. Set job.ranks_per_node={cluster.gpus_per_node} or fewer."
        )
    cores = cluster.cpus_per_node
    if cores is not None and ranks * (job.cpus_per_rank or 1) > cores:
        found.append(
            f"job.ranks_per_node × job.cpus_per_rank is {ranks * (job.cpus_per_rank or 1)}, but a node of cluster "
            f"{cluster.name!r} has {cores} cores. Lower one of them."
        )
    return found


def _signal_lead(job: JobConfig, seconds: int) -> list[str]:
    if job.signal_lead_s * 3 <= seconds:
        return _at_least("job.signal_lead_s", job.signal_lead_s, 1)
    return [
        f"job.signal_lead_s is {job.signal_lead_s}, more than a third of job.time={job.time}. Lower it or ask for more time."
    ]


def _limits(job: JobConfig, cluster: ClusterConfig, seconds: int) -> list[str]:
    """What the cluster, and the partition where it is stricter, allow."""
    partition = job.partition or cluster.partition
    limits = cluster.partitions.get(partition or "", PartitionConfig())
    where = f"partition {partition} of cluster" if limits != PartitionConfig() else "cluster"
    found = []
    max_time = limits.max_time or cluster.max_time
    limit = parse_time(max_time) if max_time else None
    if limit is not None and seconds > limit:
        found.append(f"job.time is {job.time}, {where} {cluster.name!r} allows at most {max_time}.")
    max_nodes = limits.max_nodes or cluster.max_nodes
    if max_nodes is not None and job.nodes > max_nodes:
        found.append(f"job.nodes is {job.nodes}, {where} {cluster.name!r} has at most {max_nodes} per job.")
    if limits.max_node_minutes is not None and job.nodes * seconds > limits.max_node_minutes * 60:
        found.append(
            f"job.nodes × job.time is {job.nodes * seconds / 60:g} node-minutes, {where} {cluster.name!r} allows "
            f"at most {limits.max_node_minutes}."
        )
    return found


def _batch_split(config: Config) -> list[str]:
    """Whether the job's ranks can share a batch. One rank says nothing: mpiexec may start more, and they check again."""
    ranks, plane = num_ranks(config), config.dataplane
    if ranks <= 1 or plane.model_parallel_size < 1:
        return []
    if ranks % plane.model_parallel_size:
        return [
            f"dataplane.model_parallel_size is {plane.model_parallel_size}, which does not divide the job's {ranks} ranks."
        ]
    groups = ranks // plane.model_parallel_size
    sharers = "ranks" if plane.model_parallel_size == 1 else f"groups of {plane.model_parallel_size} ranks"
    if plane.global_batch_size % groups:
        return [
            f"dataplane.global_batch_size is {plane.global_batch_size}, which {groups} {sharers} cannot share evenly. "
            f"Use a multiple of {groups}."
        ]
    return []


def _at_least(name: str, value: float, minimum: int) -> list[str]:
    return [] if value >= minimum else [f"{name} is {value}, expected at least {minimum}."]
