"""Record events as Weights & Biases metrics. Needs the package `wandb`; set WANDB_MODE=offline on offline machines."""

from collections.abc import Mapping
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.track.scalars import ScalarFlattener

__all__ = ["WandbTracker"]


class WandbTracker:
    """A `Tracker` that records all attempts of a run folder in one W&B run.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        try:  # An optional package.
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"track.wandb=true, but the package wandb cannot be imported ({error}).\n"
                "  Run pip install wandb, or set track.wandb=false."
            ) from None
        self._run = wandb.init(
            project=folder.name,
            id=folder.run_id,
            name=folder.run_id,
            dir=str(folder.path),
            config=to_plain(config),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")
        self._flattener = ScalarFlattener()

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        self._run.log({"step": int(event.get("step", 0)), **self._flattener.flatten(stream, event)})

    def close(self) -> None:
        self._run.finish()
