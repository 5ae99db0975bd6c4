"""Check that every experiment and every environment fits every cluster: compose and render, but submit nothing.

Price: 0.2 s of CPU time per pair.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import conf_folders
from mixtera_hpc.config.job_shape import can_start
from mixtera_hpc.errors import MixteraError
from mixtera_hpc.launch.batch.templates import EXAMPLE_ENVIRONMENTS
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script
from mixtera_hpc.launch.submit import missing_account_message

__all__ = ["CheckResult", "FailedPair", "check_all_pairs", "check_one"]

MINIMAL_OVERRIDES = ("data.root=/data", "mixture.unit=samples")
"""Enough for a configuration without an experiment, so that clusters are checked even if there is no experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPair:
    """An experiment, an environment and a cluster that do not fit together."""

    experiment: str | None
    cluster: str
    environment: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """All pairs that were tried; the field names are those of `--json`."""

    experiments: tuple[str, ...]
    clusters: tuple[str, ...]
    num_pairs: int
    """Number of combinations that were tried."""
    failures: tuple[FailedPair, ...]
    unset: tuple[str, ...]
    """Environment variables that the configs need and that are not set here. A placeholder was used for each."""


def check_all_pairs() -> CheckResult:
    """Try every `conf/experiment` (and none) with every `conf/cluster`, including your own configs in MIXTERA_CONF.

    Environments that srun of a cluster can start are tried without an experiment, with paths as examples.
    """
    folders = conf_folders()
    experiments = _options(folders, "experiment")
    clusters = _options(folders, "cluster")
    unset = sorted(name for name in _needed_variables(folders) if name not in os.environ)

    with _placeholders(unset):
        pairs = [(experiment, cluster, "none") for experiment in (None, *experiments) for cluster in clusters]
        pairs += [(None, cluster, environment) for cluster in clusters for environment in _environments(cluster)]
        failures = [
            FailedPair(experiment=experiment, cluster=cluster, environment=environment, problem=problem)
            for experiment, cluster, environment in pairs
            if (problem := _problem(experiment, cluster, environment))
        ]
    return CheckResult(
        experiments=tuple(experiments),
        clusters=tuple(clusters),
        num_pairs=len(pairs),
        failures=tuple(failures),
        unset=tuple(unset),
    )


def check_one(overrides: Sequence[str]) -> str | None:
    """Compose one configuration and render its script; return what a job would still need, if anything.

    Raises:
        ConfigError: it has a problem; the message lists all of them.
    """
    config = compose(overrides)
    render_script(SbatchJob(config=config))
    return missing_account_message(config)


def _problem(experiment: str | None, cluster: str, environment: str) -> str | None:
    """Return the error of composing and rendering one combination; None if it fits."""
    chosen = list(MINIMAL_OVERRIDES) if experiment is None else [f"experiment={experiment}"]
    try:
        check_one([*chosen, f"cluster={cluster}", *EXAMPLE_ENVIRONMENTS[environment]])
    except MixteraError as error:
        return str(error)
    return None


def _environments(cluster: str) -> list[str]:
    """Return the environments besides `none` that srun of the cluster can start."""
    try:
        config = compose([*MINIMAL_OVERRIDES, f"cluster={cluster}"])
    except MixteraError:
        return []  # Reported as the pair without an experiment.
    return [name for name in EXAMPLE_ENVIRONMENTS if name != "none" and can_start(config.cluster, name)]


def _options(folders: list[Path], group: str) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _needed_variables(folders: list[Path]) -> set[str]:
    """Return the names in `${oc.env:NAME}` without a default."""
    texts = [path.read_text() for folder in folders for path in folder.rglob("*.yaml")]
    return {name for text in texts for name in re.findall(r"\$\{oc\.env:(\w+)\}", text)}


@contextmanager
def _placeholders(names: list[str]) -> Iterator[None]:
    """Set the environment variables `names` to placeholder paths, and unset them afterwards."""
    os.environ.update({name: f"/{name}" for name in names})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
