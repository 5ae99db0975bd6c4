"""Finding runs and their configuration, for the verbs that take a RUN."""

import os
from pathlib import Path

from mixtera_hpc.config.runfolder import RunFolder
from mixtera_hpc.config.schema import Config

__all__ = ["find_run", "run_config", "runs_root"]


def runs_root(root: str | None = None) -> Path:
    """The folder of all runs: as given, `$MIXTERA_RUNS`, or `runs`."""
    return Path(root or os.environ.get("MIXTERA_RUNS") or "runs")


def find_run(name: str, root: str | None = None) -> RunFolder:
    """The run that `name` means; LaunchError with near misses when there is none."""
    return RunFolder.find(name, runs_root(root))


def run_config(folder: RunFolder) -> Config:
    """The configuration a run was started with."""
    from mixtera_hpc.config.compose import load_yaml
    from mixtera_hpc.config.convert import from_plain

    return from_plain(Config, load_yaml(folder.config))
