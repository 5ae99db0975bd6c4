"""`python -m mixtera_hpc.launch.batch.templates slurm/templates`: a short batch script per cluster and environment.

The renderer of `submit` writes them, so their parameters and variables are those of submitted jobs. A test compares
the folder with what this module renders.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import group_options
from mixtera_hpc.config.job_shape import can_start
from mixtera_hpc.launch.sbatch_script import render_template

__all__ = ["EXAMPLE_ENVIRONMENTS", "Template", "templates"]

EXAMPLE_ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "venv": ("environment=venv", "environment.venv=/path/to/venv"),
    "uenv": ("environment=uenv", "environment.image=pytorch/v2.9.1:v2", "environment.venv=/path/to/venv"),
    "container": ("environment=container", "environment.image=/path/to/container.toml"),
}
"""Overrides that choose each environment, with paths as examples."""

_WITHOUT_SLURM = ("local",)

_OVERRIDES = ("data.root=/data", "mixture.unit=samples", "run.name=mixtera", "job.nodes=2", "job.time=12:00:00")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A batch script for one cluster and one environment."""

    name: str
    """Name of the file."""
    text: str


def templates() -> Iterator[Template]:
    """Yield the templates of the shipped clusters, except for the environment `none`, which needs no template."""
    for name in group_options("cluster"):
        if name in _WITHOUT_SLURM:
            continue
        cluster = compose([*_OVERRIDES, f"cluster={name}"]).cluster
        for environment, overrides in EXAMPLE_ENVIRONMENTS.items():
            if environment != "none" and can_start(cluster, environment):
                yield _template(name, environment, overrides)


def _template(cluster: str, environment: str, overrides: tuple[str, ...]) -> Template:
    config = compose([*_OVERRIDES, f"cluster={cluster}", *overrides])
    if config.cluster.needs_account:
        config = replace(config, job=replace(config.job, account="PROJECT"))
    file_name = f"{cluster}_{environment}.sbatch"
    introduction = [
        f"# Ranks on {cluster}, environment={environment}. Copy this file and change paths, account, nodes and time:",
        f"#   sbatch {file_name} run experiment=mine",
        f"#   sbatch {file_name} resume RUN",
        "# mixtera-hpc submit writes the same job, and also submits follow-up jobs until the run is complete.",
        "# Written by python -m mixtera_hpc.launch.batch.templates slurm/templates",
    ]
    return Template(name=file_name, text=render_template(config, introduction))


def _write_all(folder: Path) -> None:
    for template in templates():
        (folder / template.name).write_text(template.text)


if __name__ == "__main__":
    _write_all(Path(sys.argv[1]))
