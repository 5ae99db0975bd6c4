"""Every key a user may write, its type, default and meaning.

Plain frozen dataclasses: Hydra and OmegaConf end at `compose.py`, nothing below ever sees a DictConfig. The sentence under
a field is its documentation; `mixtera_hpc.config.convert` turns nested dicts into these and lists every problem at once.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from mixtera_hpc.config.schema_data import DataConfig, IndexConfig, PropertyConfig

__all__ = [
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DataPlaneConfig",
    "DomainConfig",
    "HoldoutConfig",
    "IndexConfig",
    "JobConfig",
    "MixtureConfig",
    "PartitionConfig",
    "PlanConfig",
    "PropertyConfig",
    "QueryConfig",
    "RunConfig",
    "ScheduleConfig",
    "StageConfig",
    "TrackConfig",
    "TrainingConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldoutConfig:
    """Samples that training never sees: a hash of each one's shard path and row decides."""

    fraction: float = 0.0
    """Of all samples; 0 holds nothing out."""
    seed: int = 0
    """Another seed holds out other samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryConfig:
    """Which samples take part at all."""

    where: str | None = None
    """Boolean expression over properties, e.g. `language in ['en', 'de'] and quality >= 0.7 and 'python' in tags`."""
    drop: list[str] = field(default_factory=list)
    """Samples that match one of these expressions are passed over; the order of the others stays as it was without. Written by
    `mixtera-hpc resume RUN --drop`."""
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    """What is kept for validation."""
    split: Literal["train", "validation"] = "train"
    """With a holdout: which side of it is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainConfig:
    """One component of the mixture, or a group of them."""

    key: dict[str, Any] = field(default_factory=dict)
    """Property → value, pattern (`c4*`, or `{matches: c4-(en|de)}`), null, or a list of these; a sample belongs to the first domain, in
    written order, that it matches. Inside a group, the group's key counts as well."""
    weight: float | None = None
    """Share of the mixture, or of the group. Siblings without weights share by size."""
    floor: float | None = None
    """Smallest share of the mixture; null takes `mixture.floor`."""
    cap: float | None = None
    """Largest share of the mixture; null takes `mixture.cap`."""
    max_epochs: float | None = None
    """Passes over this domain; null takes `mixture.max_epochs`."""
    domains: list["DomainConfig"] = field(default_factory=list)
    """The members of a group, for `hierarchical`: their weights are shares of the group's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """A mixture inside a schedule; what it does not say is as in `mixture`."""

    start: float
    """Where it begins, in `schedule.unit`; the first at 0."""
    kind: Literal["natural", "static", "hierarchical", "dynamic"] = "static"
    """Like `mixture.kind`. A dynamic stage sees the losses from the run's first step on."""
    domains: list[DomainConfig] = field(default_factory=list)
    """Keys and weights; domains of the mixture that are not named have weight 0. Empty: those of `mixture.domains`."""
    remainder: DomainConfig | None = None
    """Like `mixture.remainder`, with `domains`."""
    normalize: bool = False
    """Like `mixture.normalize`."""
    temperature: float | None = None
    """Like `mixture.temperature`."""
    unimax_epochs: float | None = None
    """Like `mixture.unimax_epochs`."""
    algorithm: dict[str, Any] = field(default_factory=lambda: {"name": "ado"})
    """Like `mixture.algorithm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Mixtures that follow each other. The weights of a chunk are those at its first step."""

    unit: Literal["steps", "tokens"] = "steps"
    """What `stages[].start` counts: steps, or predicted tokens of all ranks together."""
    shape: Literal["stepwise", "linear", "cosine"] = "stepwise"
    """From one stage to the next: at once at its start, or gradually between the two starts."""
    stages: list[StageConfig] = field(default_factory=list)
    """In order of `start`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """In which proportion the domains are served."""

    kind: Literal["natural", "static", "hierarchical", "schedule", "arbitrary", "dynamic"] = "natural"
    """Natural shares of the index, fixed weights, weights of groups and their members, mixtures that follow each other, index
    order without proportions, or weights learned while training."""
    unit: Literal["tokens", "samples"] = "tokens"
    """What is counted: packed sequences of tokens, or samples."""
    domains: list[DomainConfig] = field(default_factory=list)
    """The components. Empty: one domain per value of `group_by`, or a single domain of everything."""
    group_by: list[str] = field(default_factory=list)
    """With no `domains`: the properties whose distinct values make the domains."""
    remainder: DomainConfig | None = None
    """One more domain, the last, of everything that matches no key: `{weight: 0.1}`."""
    normalize: bool = False
    """Scale weights that do not sum to 1, instead of refusing them."""
    temperature: float | None = None
    """For natural weights: size^(1/temperature). 1 is natural; more makes domains more equal."""
    unimax_epochs: float | None = None
    """For natural weights: as equal as this many passes over each domain within `training.num_steps` allow (UniMax)."""
    floor: float | None = None
    """Smallest share of any domain, whatever `kind` says."""
    cap: float | None = None
    """Largest share of any domain, whatever `kind` says."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """For `schedule`: the stages."""
    on_exhausted: Literal["repeat", "redistribute", "stop"] = "repeat"
    """When a domain has been served `max_epochs` times: with `repeat` and `stop` the data ends, with `redistribute` its share
    goes to the others in proportion to their weights."""
    max_epochs: float | None = None
    """Passes over a domain before it is exhausted. Default: unlimited for `repeat`, 1 for the others."""
    algorithm: dict[str, Any] = field(default_factory=lambda: {"name": "ado"})
    """For `dynamic`: the mixing algorithm's `name` and its parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneConfig:
    """How samples become batches on every rank."""

    tokenizer: str | None = None
    """A Hugging Face `tokenizer.json`. Needed for `mixture.unit=tokens`, unless all shards hold token ids."""
    vocab_size: int | None = None
    """Instead of a tokenizer, where all shards hold token ids (Megatron): one more than the largest id."""
    eos_id: int | None = None
    """With `vocab_size`: the token that ends a document."""
    seq_len: int = 1024
    """Predicted tokens per sequence; a sequence holds one more."""
    overlap_one_token: bool = True
    """A sequence begins with the last token of the one before, so that every token is predicted once. False: no token is
    handed out twice, and every (seq_len + 1)th is never predicted."""
    global_batch_size: int = 64
    """Sequences (or samples) of one step over all ranks."""
    chunk_steps: int = 8
    """Steps between two decisions about the mixture; one broadcast each."""
    feedback_lag: int = 2
    """Statistics of chunk c change the weights from chunk c + feedback_lag on, always."""
    seed: int = 0
    """Decides every shuffle."""
    shuffle: Literal["none", "block", "window"] = "window"
    """Index order; blocks shuffled; or blocks shuffled and rows shuffled inside windows of `shuffle_window` blocks."""
    shuffle_window: int = 64
    """Blocks whose rows are shuffled together."""
    add_eos: bool = True
    """End every document with the end-of-text token."""
    eos_token: str | None = None
    """The end-of-text token; found in the tokenizer when null."""
    predict_across_documents: bool = False
    """Count the loss of the first token of a document as well."""
    prefetch_batches: int = 4
    """Batches that are kept ready."""
    workers: int = 0
    """Processes that read for each rank, for data that one thread cannot keep up with; 0: a thread."""
    model_parallel_size: int = 1
    """Neighbouring ranks that receive the same batch (tensor, pipeline and context parallel peers)."""
    comm: Literal["auto", "local", "mpi"] = "auto"
    """How ranks talk: `auto` uses MPI when the process was started by an MPI launcher."""
    audit: bool = False
    """Log a digest of every sequence, or sample, handed to the trainer, for `trace --verify`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The reference trainer: a small GPT."""

    num_steps: int = 100
    """Optimizer steps of the whole run."""
    num_layers: int = 4
    num_heads: int = 4
    embedding_dim: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    micro_batch_size: int | None = None
    """Sequences per forward pass; null takes the rank's whole share at once."""
    seed: int = 0
    """Initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = 1
    """CPU threads of torch per rank."""
    validate_every: int = 0
    """Steps between validations on the samples held out (`query.holdout`); 0: never. There is one at the end as well."""
    validate_steps: int = 8
    """Global batches of one validation, always the same ones; fewer when that is all there is."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only at the end and when asked to stop."""
    keep_checkpoints: int = 2
    """Older checkpoints beyond this many are removed."""
    stop_after: int | None = None
    """Save and leave with exit code 75 after this step, as if a stop had been requested."""
    log_every: int = 1
    """Steps between lines of `metrics/steps.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackConfig:
    """Where metric events go besides JSONL, which is always written."""

    tensorboard: bool = False
    """Scalars for TensorBoard, in the run's folder; needs the package `tensorboard`."""
    wandb: bool = False
    """Weights & Biases; needs the package `wandb`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where a run's folder lies."""

    name: str = "run"
    """Groups runs: the folder is `<root>/<name>/<run_id>`."""
    root: str = "runs"
    """Folder of all runs; must be on a file system that all nodes share."""
    id: str | None = None
    """Made from the time and the configuration when null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """What is asked of Slurm."""

    name: str | None = None
    """Job name; null takes `run.name`."""
    nodes: int = 1
    ranks_per_node: int | None = None
    """One rank per GPU; null takes the cluster's."""
    time: str = "01:00:00"
    """Time limit as `HH:MM:SS` or `D-HH:MM:SS`; in a file in quotes."""
    account: str | None = None
    partition: str | None = None
    """Null takes the cluster's, or Slurm's default."""
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    cpus_per_rank: int | None = None
    """Null divides the cluster's cores by the ranks of a node."""
    mem: str | None = None
    """Memory of a node in Slurm's units (`460000`, `200G`); null takes the cluster's."""
    signal_lead_s: int = 120
    """Seconds before the time limit at which the job is told to save."""
    max_attempts: int = 1
    """Jobs in the chain: an attempt that leaves with 75 is followed by the next, up to this many."""
    comment: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    container: str | None = None
    """What the cluster's `container_flag` takes: an environment file, an image or a uenv."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun, after the cluster's."""
    command: list[str] | None = None
    """What every rank executes instead of the reference trainer; finds its run in MIXTERA_RUN_FOLDER and MIXTERA_ATTEMPT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionConfig:
    """Limits of one partition; null: the cluster's."""

    max_nodes: int | None = None
    max_time: str | None = None
    max_node_minutes: int | None = None
    """Bound of nodes × time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What a site's nodes look like and how ranks are started there."""

    name: str = "local"
    ranks_per_node: int = 1
    """Default and upper bound of `job.ranks_per_node` where ranks are bound to GPUs."""
    gpus_per_node: int = 0
    gpu_request: Literal["gpus-per-task", "gpus-per-node", "gres"] = "gpus-per-task"
    """How GPUs are asked for: one per rank, all of a node, or all of a node as a generic resource."""
    cpus_per_node: int | None = None
    """Cores of a node that ranks may use."""
    max_nodes: int | None = None
    max_time: str | None = None
    mem: str | None = None
    partition: str | None = None
    """Taken when `job.partition` is null."""
    partitions: dict[str, PartitionConfig] = field(default_factory=dict)
    """Valid partitions and their limits; empty: not checked."""
    needs_account: bool = False
    mpi: str | None = None
    """Value of `srun --mpi`."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further `#SBATCH` parameters, which `job.*` may replace; true is a bare flag, null takes one of ours away."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every rank, taken literally; write what the shell shall expand into `setup`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script before srun."""
    wrapper: list[str] = field(default_factory=list)
    """Words between srun and python (numactl, a container's exec)."""
    container_flag: str | None = None
    """The flag of srun that takes `job.container`; null: this cluster has none."""
    python: str | None = None
    """The interpreter on the compute nodes; null takes the submitting one, or `python` in a container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What `mixtera-hpc plan` prints."""

    first_step: int = 0
    steps: int | None = None
    """Steps to print; null takes one chunk for `--json` and the whole run for the forecast."""
    digests: bool = False
    """With `--json`: read the data, and add a `digest` of its tokens, or of the sample, to every sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run."""

    data: DataConfig
    index: IndexConfig
    query: QueryConfig = field(default_factory=QueryConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    dataplane: DataPlaneConfig = field(default_factory=DataPlaneConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    run: RunConfig = field(default_factory=RunConfig)
    job: JobConfig = field(default_factory=JobConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
