"""Check that every experiment and every environment fits every cluster: compose and render, but submit nothing.

Price: 0.15 s of CPU time per combination.
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
from mixtera_hpc.config.schema import Config
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _CombinationResult:
    """The result of one combination."""

    cluster: str
    environments: tuple[str, ...] = ()
    """Environments besides `none` that srun of the cluster can start; empty if the combination failed."""
    failure: FailedPair | None = None


def check_all_pairs() -> CheckResult:
    """Try every `conf/experiment` (and none) with every `conf/cluster`, including your own configs in MIXTERA_CONF.

    Environments that srun of a cluster can start are tried without an experiment, with paths as examples.
    """
    folders = conf_folders()
    experiments = _options(folders, "experiment")
    clusters = _options(folders, "cluster")
    unset = sorted(name for name in _needed_variables(folders) if name not in os.environ)

    with _placeholders(unset):
        plain = [_check_combination(None, cluster, "none") for cluster in clusters]
        combined = [
            *((experiment, cluster, "none") for experiment in experiments for cluster in clusters),
            *((None, result.cluster, environment) for result in plain for environment in result.environments),
        ]
        results = [*plain, *(_check_combination(*combination) for combination in combined)]
    return CheckResult(
        experiments=tuple(experiments),
        clusters=tuple(clusters),
        num_pairs=len(results),
        failures=tuple(result.failure for result in results if result.failure),
        unset=tuple(unset),
    )


def check_one(overrides: Sequence[str]) -> str | None:
    """Compose one configuration and render its script; return what a job would still need, if anything.

    Raises:
        ConfigError: it has a problem; the message lists all of them.
    """
    return missing_account_message(_rendered(overrides))


def _rendered(overrides: Sequence[str]) -> Config:
    """Compose a configuration and render its script; return the configuration."""
    config = compose(overrides)
    render_script(SbatchJob(config=config))
    return config


def _check_combination(experiment: str | None, cluster: str, environment: str) -> _CombinationResult:
    """Compose and render one combination."""
    chosen = list(MINIMAL_OVERRIDES) if experiment is None else [f"experiment={experiment}"]
    try:
        config = _rendered([*chosen, f"cluster={cluster}", *EXAMPLE_ENVIRONMENTS[environment]])
    except MixteraError as error:
        failure = FailedPair(experiment=experiment, cluster=cluster, environment=environment, problem=str(error))
        return _CombinationResult(cluster=cluster, failure=failure)
    startable = [name for name in EXAMPLE_ENVIRONMENTS if name != "none" and can_start(config.cluster, name)]
    return _CombinationResult(cluster=cluster, environments=tuple(startable))


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
