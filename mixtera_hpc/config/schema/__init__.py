"""Every key that a user can set: its type, its default and its description.

The dataclasses here are the only place a default is written. The string below a field is its documentation, from which
`docs/config.md` is generated. `config/composition/schema_store.py` registers the tree in Hydra's ConfigStore, and
`config/convert.py` builds the dataclasses from what Hydra composed. No other module sees OmegaConf objects.
"""

from dataclasses import dataclass, field

from mixtera_hpc.config.schema.data import DataConfig, DataSetConfig, DataSetKeys, IndexConfig, PropertyConfig
from mixtera_hpc.config.schema.dataplane import BatchStageConfig, DataPlaneConfig
from mixtera_hpc.config.schema.job import ClusterConfig, EnvironmentConfig, JobConfig, PartitionConfig
from mixtera_hpc.config.schema.mixture import DomainConfig, MixtureConfig, ScheduleConfig, StageConfig
from mixtera_hpc.config.schema.query import HoldoutConfig, QueryConfig
from mixtera_hpc.config.schema.run import PlanConfig, RunConfig, TrackConfig
from mixtera_hpc.config.schema.swarm import SwarmConfig
from mixtera_hpc.config.schema.sweep import SweepConfig
from mixtera_hpc.config.schema.training import CheckpointConfig, TrainingConfig

__all__ = [
    "BatchStageConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DataPlaneConfig",
    "DataSetConfig",
    "DataSetKeys",
    "DomainConfig",
    "EnvironmentConfig",
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
    "SwarmConfig",
    "SweepConfig",
    "TrackConfig",
    "TrainingConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration of a run."""

    data: DataConfig
    """The files that hold the samples, and the places of the text and the properties in a row."""
    index: IndexConfig
    """The property index files, and how an index is built."""
    query: QueryConfig = field(default_factory=QueryConfig)
    """Selection of the samples that take part, and of those that are held out for validation."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """The domains and the proportions in which they are served."""
    dataplane: DataPlaneConfig = field(default_factory=DataPlaneConfig)
    """Rules by which samples become the batches of every rank."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The reference trainer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints of the reference trainer: the steps at which it saves, and the number that stay."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Destinations of metrics in addition to the JSONL files of the run folder."""
    run: RunConfig = field(default_factory=RunConfig)
    """The name and the folder of the run."""
    job: JobConfig = field(default_factory=JobConfig)
    """Resources that the job requests from Slurm."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Properties of the nodes of a cluster, and the way in which ranks are started on them."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """The Python interpreter and packages of the ranks of a job."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """The comparison that `mixtera-hpc sweep` makes."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Output of `mixtera-hpc plan`."""
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    """The mixtures that `mixtera-hpc swarm` samples, and the regression that proposes one."""
