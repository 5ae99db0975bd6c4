"""Find all problems of a configuration at once. Needs no cluster, no MPI and no index."""

import math
import re

from mixtera_hpc.config.batch_memory import size_problems
from mixtera_hpc.config.batch_ramp import batch_schedule_of, ramp_problems, sizes_from
from mixtera_hpc.config.check_data import data_problems, holdout_problems, root_problems
from mixtera_hpc.config.check_job import job_problems
from mixtera_hpc.config.check_numbers import all_at_least, at_least
from mixtera_hpc.config.check_script import script_problems
from mixtera_hpc.config.convert import raise_problems
from mixtera_hpc.config.job_shape import cpus_per_rank, num_ranks
from mixtera_hpc.config.mixture.check_swarm import swarm_problems
from mixtera_hpc.config.packing.check_packing import cost_problems, packing_problems
from mixtera_hpc.config.schema import (
    CheckpointConfig,
    Config,
    DataPlaneConfig,
    MixtureConfig,
    PlanConfig,
    RunConfig,
    SweepConfig,
    TrainingConfig,
)

__all__ = ["WORKERS_PER_CORE", "check_build", "check_data", "check_index_job", "check_run", "run_problems"]

WORKERS_PER_CORE = 4
"""Worker processes per core; they wait for files a part of their time."""

MAX_WORKERS = 64
"""Reading processes of a rank whose cores are not known: as many as 16 cores may have."""

MAX_FEEDBACK_LAG = 1_000_000
"""Chunks. Weights that react later than this do not react."""

MAX_LANES = 1 << 16
"""Four lanes for each of 16,384 nodes. Every rank has arrays of this length."""

MAX_CHUNK_SEQUENCES = 1_000_000
"""Sequences of one chunk. The planner decides them one by one on rank 0, and a broadcast must stay small."""


def check_run(config: Config, first_step: int = 0) -> None:
    """Raise one ConfigError that names every problem of `config` for the steps from data step `first_step` on."""
    raise_problems(run_problems(config, first_step))


def check_data(config: Config) -> None:
    """Check what verbs need that read data and indexes, but nothing of a run."""
    raise_problems(_data(config))


def check_build(config: Config) -> None:
    """Check what `index build` and `index refresh` need: `check_data`, and a data root."""
    raise_problems([*root_problems(config.data), *_data(config)])


def check_index_job(config: Config) -> None:
    """Check what a job that works on an index needs besides `check_build` or `check_data`."""
    raise_problems(
        [
            *_run(config.run),
            *job_problems(config.job, config.cluster, config.environment),
            *script_problems(config),
        ]
    )


def run_problems(config: Config, first_step: int = 0) -> list[str]:
    """Return everything wrong with `config` for the steps from data step `first_step` on, one or two sentences each."""
    return [
        *_data(config),
        *_dataplane(config.dataplane, config.mixture),
        *_transform(config),
        *cost_problems(config.dataplane, config.data.transform),
        *_training(config.training),
        *_checkpoint(config.checkpoint),
        *_validation(config),
        *_run(config.run),
        *_plan(config.plan),
        *_sweep(config.sweep),
        *swarm_problems(config.swarm),
        *job_problems(config.job, config.cluster, config.environment),
        *script_problems(config),
        *_workers(config),
        *_batch_split(config, first_step),
    ]


def _data(config: Config) -> list[str]:
    # Imported here because it imports numpy and all mixing algorithms, and verbs import this module for `--help` too.
    from mixtera_hpc.config.mixture.check_mixture import mixture_problems

    return [
        *data_problems(config.data, config.index),
        *_vocabulary(config.dataplane),
        *mixture_problems(config.mixture),
        *holdout_problems(config.query),
    ]


def _vocabulary(plane: DataPlaneConfig) -> list[str]:
    problems = []
    if plane.vocab_size is not None and not 1 <= plane.vocab_size < 1 << 31:
        problems.append(f"dataplane.vocab_size is {plane.vocab_size}, expected 1 to 2**31 - 1.")
    if plane.vocab_size is not None and plane.tokenizer is not None:
        problems.append(
            "dataplane.vocab_size and dataplane.tokenizer are both set. Leave out the size: the tokenizer has it."
        )
    if plane.eos_id is not None and not 0 <= plane.eos_id < (plane.vocab_size or 0):
        problems.append(
            f"dataplane.eos_id is {plane.eos_id}, expected an id below dataplane.vocab_size={plane.vocab_size}. With a "
            "tokenizer, name its token with dataplane.eos_token."
        )
    return problems


def _dataplane(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    positive = (
        "seq_len",
        "global_batch_size",
        "chunk_steps",
        "window_bytes",
        "lanes",
        "prefetch_batches",
        "model_parallel_size",
    )
    problems = all_at_least("dataplane", plane, 1, positive)
    problems += at_least("dataplane.feedback_lag", plane.feedback_lag, 2)
    problems += at_least("dataplane.workers", plane.workers or 0, 0)
    if plane.feedback_lag > MAX_FEEDBACK_LAG:
        problems.append(f"dataplane.feedback_lag is {plane.feedback_lag}, expected at most {MAX_FEEDBACK_LAG} chunks.")
    if plane.lanes is not None and plane.lanes > MAX_LANES:
        problems.append(f"dataplane.lanes is {plane.lanes}, expected at most {MAX_LANES}.")
    if plane.window_bytes >= 1 << 62:
        problems.append(f"dataplane.window_bytes is {plane.window_bytes}, expected less than 2**62 bytes.")

    if not 0 <= plane.seed < 2**63:
        problems.append(f"dataplane.seed is {plane.seed}, expected 0 to 2**63 - 1.")
    problems += ramp_problems(plane)
    problems += size_problems(plane, mixture)
    chunk_sequences = plane.chunk_steps * batch_schedule_of(plane).largest
    if chunk_sequences > MAX_CHUNK_SEQUENCES:
        problems.append(
            f"dataplane.chunk_steps × the largest global batch is {chunk_sequences}, "
            f"at most {MAX_CHUNK_SEQUENCES} sequences fit in one chunk. Lower dataplane.chunk_steps."
        )
    for name, scale in plane.scalars.items():
        if not name.isidentifier() or not 0 < scale < 1e300:
            problems.append(
                f"dataplane.scalars.{name} is {scale:g}; expected a name of letters, digits and _, and a largest "
                "absolute value above 0."
            )
    return problems + _watchdog(plane) + _plane_of_mixture(plane, mixture) + packing_problems(plane, mixture)


def _watchdog(plane: DataPlaneConfig) -> list[str]:
    problems = at_least("dataplane.watchdog_s", plane.watchdog_s, 0)
    problems += at_least("dataplane.watchdog_trainer_s", plane.watchdog_trainer_s, 1)
    if 0 < plane.watchdog_s < 1:
        problems.append(f"dataplane.watchdog_s is {plane.watchdog_s}, expected at least 1 second, or 0 to turn it off.")
    return problems


def _plane_of_mixture(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    """Check settings of the data plane that depend on the mixture."""
    problems = []
    if mixture.kind == "arbitrary" and plane.shuffle != "none":
        problems.append(
            f"mixture.kind=arbitrary serves samples in index order, but dataplane.shuffle is {plane.shuffle}. Set "
            "dataplane.shuffle=none, or mixture.kind=natural."
        )
    if mixture.unit == "tokens" and plane.tokenizer is None and plane.vocab_size is None:
        problems.append(
            "dataplane.tokenizer is not set, but mixture.unit=tokens counts tokens. Give a tokenizer.json, "
            "dataplane.vocab_size where all shards hold token ids, or set mixture.unit=samples."
        )
    return problems


def _transform(config: Config) -> list[str]:
    transform = config.data.transform
    if transform is None or config.mixture.unit == "samples":
        return []
    return [
        f"data.transform is {transform}, but mixture.unit is {config.mixture.unit}: only samples are transformed. Set "
        "mixture.unit=samples, or remove data.transform."
    ]


def _training(training: TrainingConfig) -> list[str]:
    positive = (
        *("num_steps", "num_layers", "num_heads", "embedding_dim", "num_threads"),
        *("log_every", "validate_steps", "validate_min_sequences"),
    )
    problems = all_at_least("training", training, 1, (*positive, "micro_batch_size", "stop_after"))
    not_negative = ("warmup_steps", "validate_every", "weight_decay", "anneal_from_step", "anneal_from_rate")
    problems += all_at_least("training", training, 0, not_negative)
    if not -(2**63) <= training.seed < 2**63:
        problems.append(f"training.seed is {training.seed}, expected a number of 64 bits.")
    for name in ("learning_rate", "grad_clip"):
        if not getattr(training, name) > 0:
            problems.append(f"training.{name} is {getattr(training, name)}, expected more than 0.")
    if training.embedding_dim % max(2 * training.num_heads, 1):
        problems.append(
            f"training.embedding_dim is {training.embedding_dim}, expected a multiple of 2 × training.num_heads="
            f"{training.num_heads}: rotary positions turn pairs of numbers."
        )
    return problems


def _checkpoint(checkpoint: CheckpointConfig) -> list[str]:
    return [
        *at_least("checkpoint.every_steps", checkpoint.every_steps, 0),
        *at_least("checkpoint.keep", checkpoint.keep, 1),
    ]


def _validation(config: Config) -> list[str]:
    if config.query.holdout.fraction or not config.training.validate_every:
        return []
    return ["training.validate_every is set, but nothing is held out. Set query.holdout.fraction, e.g. to 0.01."]


def _run(run: RunConfig) -> list[str]:
    names = {"run.name": run.name, "run.id": run.id}
    return [
        f"{key} is {value!r}, which cannot name a folder. Use letters, digits, '.', '_' and '-'."
        for key, value in names.items()
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value)
    ]


def _plan(plan: PlanConfig) -> list[str]:
    problems = [
        *at_least("plan.first_step", plan.first_step, 0),
        *all_at_least("plan", plan, 1, ("steps",)),
    ]
    if plan.step_s is not None and not 0 < plan.step_s < math.inf:
        problems.append(f"plan.step_s is {plan.step_s}, expected the seconds of a step, a finite number above 0.")
    return problems


def _sweep(sweep: SweepConfig) -> list[str]:
    if sweep.scaling == "weak" and sweep.batch_per_node is None:
        return [
            "sweep=weak multiplies dataplane.global_batch_size by job.nodes, which only mixtera-hpc sweep does. Use "
            "it, or remove sweep=weak."
        ]
    if sweep.scaling != "weak" and sweep.batch_per_node is not None:
        return [
            f"sweep.batch_per_node is {sweep.batch_per_node}, but only a weak sweep has a batch per node. Remove it, "
            "or add sweep=weak."
        ]
    return all_at_least("sweep", sweep, 1, ("batch_per_node",))


def _workers(config: Config) -> list[str]:
    """Check the number of reading processes of a rank. A rank checks it again with the cores that it was given."""
    workers = config.dataplane.workers
    if workers is None or config.job.nodes < 1 or num_ranks(config) < 1:
        return []
    cores = cpus_per_rank(config)
    if cores is None and workers > MAX_WORKERS:
        return [
            f"dataplane.workers is {workers}, but where the cores of a rank are not known, at most {MAX_WORKERS} are "
            f"accepted. Lower it, or set job.cpus_per_rank: {WORKERS_PER_CORE} for each core are accepted then."
        ]
    if cores is None or cores < 1 or workers <= WORKERS_PER_CORE * cores:
        return []
    known = f"job.cpus_per_rank={cores}" if config.job.cpus_per_rank is not None else f"the {cores} cores of a rank"
    return [
        f"dataplane.workers is {workers}, more than {WORKERS_PER_CORE} × {known}. More processes than cores slow each "
        "other down. Lower it."
    ]


def _batch_split(config: Config, first_step: int) -> list[str]:
    """Check that the ranks of the job can share every batch from data step `first_step` on evenly.

    One rank is not checked: mpiexec may start more, and they check again when they start.
    """
    ranks = num_ranks(config)
    size = config.dataplane.model_parallel_size
    if ranks <= 1 or size < 1:
        return []
    if ranks % size:
        return [f"dataplane.model_parallel_size is {size}, which does not divide the job's {ranks} ranks."]
    groups = ranks // size
    sharers = "ranks" if size == 1 else f"groups of {size} ranks"
    return [
        f"{key} is {batch_size}, which {groups} {sharers} cannot share evenly. Use a multiple of {groups}."
        for key, batch_size in sizes_from(config.dataplane, first_step).items()
        if batch_size % groups
    ]
