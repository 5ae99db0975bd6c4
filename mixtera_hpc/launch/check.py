"""Does every experiment fit every cluster? Composes and checks all pairs; asks no cluster and starts no MPI."""

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

_BARE = ("data.root=/data", "mixture.unit=samples")
"""Enough for a configuration without an experiment, so that clusters are checked where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPair:
    """A pair that does not work."""

    experiment: str | None
    cluster: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """All pairs that were tried."""

    experiments: tuple[str, ...]
    clusters: tuple[str, ...]
    misfits: tuple[FailedPair, ...]
    unset: tuple[str, ...]
    """Environment variables the configs need that are not set here; a placeholder stood in for them."""


def check_all_pairs() -> CheckResult:
    """Try every `conf/experiment` (and none) with every `conf/cluster`, team configs on MIXTERA_CONF included."""
    folders = conf_folders()
    experiments = _options(folders, "experiment")
    clusters = _options(folders, "cluster")
    unset = sorted(name for name in _needed_variables(folders) if name not in os.environ)
    misfits = []
    with _placeholders(unset):
        for experiment in (None, *experiments):
            for cluster in clusters:
                if problem := _problem(experiment, cluster):
                    misfits.append(FailedPair(experiment=experiment, cluster=cluster, problem=problem))
    return CheckResult(
        experiments=tuple(experiments), clusters=tuple(clusters), misfits=tuple(misfits), unset=tuple(unset)
    )


def _problem(experiment: str | None, cluster: str) -> str | None:
    chosen = [*_BARE] if experiment is None else [f"experiment={experiment}"]
    try:
        render_script(SbatchJob(config=compose([*chosen, f"cluster={cluster}"])))
    except MixteraError as error:
        return str(error)
    return None


def _options(folders: list[Path], group: str) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _needed_variables(folders: list[Path]) -> set[str]:
    """Names in `${oc.env:NAME}` without a default."""
    texts = (path.read_text() for folder in folders for path in folder.rglob("*.yaml"))
    return {name for text in texts for name in re.findall(r"\$\{oc\.env:(\w+)\}", text)}


@contextmanager
def _placeholders(names: list[str]) -> Iterator[None]:
    os.environ.update({name: f"/{name}" for name in names})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
