"""Settings of the groups `run`, `track` and `plan`: the run folder, trackers, and the forecast of a run."""

from dataclasses import dataclass

from mixtera_hpc.config.schema.composed_default import composed_from

__all__ = ["PlanConfig", "RunConfig", "TrackConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackConfig:
    """Destinations of metrics in addition to the JSONL files of the run folder."""

    tensorboard: bool = False
    """Write scalars for TensorBoard into the run folder. Needs the package `tensorboard`."""
    wandb: bool = False
    """Send metrics to Weights & Biases. Needs the package `wandb`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The name and the folder of the run."""

    name: str = "run"
    """Name of a group of runs. The folder of a run is `<root>/<name>/<id>`."""
    root: str = composed_from("${oc.env:MIXTERA_RUNS,runs}", default="runs")
    """Folder of all runs, on a file system that all nodes share."""
    id: str | None = None
    """Name of the run folder. Null makes one from the time and the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Output of `mixtera-hpc plan`."""

    first_step: int = 0
    """First step to print."""
    steps: int | None = None
    """Number of steps to print. Null: one chunk with `--json`, the whole run for the forecast."""
    step_s: float | None = None
    """Seconds that a step takes, for the GPU-hours of the forecast. Null takes the median of the run that `plan` is
    asked about, and prints no GPU-hours for a configuration."""
    digests: bool = False
    """With `--json`: read the data and add a `digest` of the tokens (or of the sample) to every sequence."""
