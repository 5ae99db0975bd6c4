"""Check that every experiment fits every cluster: compose and render all pairs, but submit nothing."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import conf_folders
from mixtera_hpc.errors import MixteraError
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script

__all__ = ["CheckResult", "FailedPair", "check_all_pairs"]

MINIMAL_OVERRIDES = ("data.root=/data", "mixture.unit=samples")
"""Enough for a configuration without an experiment, so that clusters are checked even if there is no experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPair:
    """An experiment and a cluster that do not fit."""

    experiment: str | None
    cluster: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """All pairs that were tried; the field names are those of `--json`."""

    experiments: tuple[str, ...]
    clusters: tuple[str, ...]
    failures: tuple[FailedPair, ...]
    unset: tuple[str, ...]
    """Environment variables that the configs need and that are not set here. A placeholder was used for each."""

    @property
    def num_pairs(self) -> int:
        """Number of pairs, including one pair without an experiment per cluster."""
        return (len(self.experiments) + 1) * len(self.clusters)


def check_all_pairs() -> CheckResult:
    """Try every `conf/experiment` (and none) with every `conf/cluster`, including your own configs in MIXTERA_CONF."""
    folders = conf_folders()
    experiments = _options(folders, "experiment")
    clusters = _options(folders, "cluster")
    unset = sorted(name for name in _needed_variables(folders) if name not in os.environ)

    failures = []
    with _placeholders(unset):
        for experiment in (None, *experiments):
            for cluster in clusters:
                if problem := _problem(experiment, cluster):
                    failures.append(FailedPair(experiment=experiment, cluster=cluster, problem=problem))
    return CheckResult(
        experiments=tuple(experiments), clusters=tuple(clusters), failures=tuple(failures), unset=tuple(unset)
    )


def _problem(experiment: str | None, cluster: str) -> str | None:
    """Return the error of composing and rendering one pair; None if the pair fits."""
    chosen = list(MINIMAL_OVERRIDES) if experiment is None else [f"experiment={experiment}"]
    try:
        render_script(SbatchJob(config=compose([*chosen, f"cluster={cluster}"])))
    except MixteraError as error:
        return str(error)
    return None


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
