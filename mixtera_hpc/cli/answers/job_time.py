"""The time and the GPU-hours of a run, computed from the time of a step."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from mixtera_hpc.config.job_shape import num_ranks
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import DataError, pluralize
from mixtera_hpc.report.number_format import format_duration, format_seconds
from mixtera_hpc.report.run_metrics import load_run_metrics

__all__ = ["JobTime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTime:
    """The time of a step on a job of some size."""

    step_s: float
    origin: str
    """Source of `step_s`, as messages name it."""
    num_nodes: int
    num_devices: int
    """GPUs of the job, or its ranks on a cluster without GPUs."""
    has_gpus: bool

    @classmethod
    def given(cls, config: Config) -> Self:
        """Take `plan.step_s` and the size of the job that is configured."""
        step_s = config.plan.step_s
        if step_s is None:
            raise ValueError("plan.step_s is not set")
        return cls._of_job(config, step_s, "plan.step_s", config.job.nodes, num_ranks(config))

    @classmethod
    def measured(cls, config: Config, folder: RunFolder) -> Self | None:
        """Take the median step of a run, and the size of its newest attempt; None if it has recorded no step."""
        try:
            metrics = load_run_metrics(folder)
        except DataError:
            return None
        # The first line of an attempt includes its start. A run that has no other lines still gives an estimate.
        steady = ~metrics.steps.is_attempt_start
        step_s = float(np.median(metrics.steps.step_s[steady] if steady.any() else metrics.steps.step_s))
        newest = metrics.attempts[-1] if metrics.attempts else {}
        nodes = int(newest.get("num_nodes", config.job.nodes))
        ranks = int(newest.get("num_ranks", num_ranks(config)))
        return cls._of_job(config, step_s, f"the median of {folder.run_id}", nodes, ranks) if step_s > 0 else None

    @classmethod
    def _of_job(cls, config: Config, step_s: float, origin: str, nodes: int, ranks: int) -> Self:
        has_gpus = config.cluster.gpus_per_node > 0
        # A node is allocated whole on most clusters with GPUs, also if fewer ranks run on it.
        devices = nodes * config.cluster.gpus_per_node if has_gpus else ranks
        return cls(step_s=step_s, origin=origin, num_nodes=nodes, num_devices=devices, has_gpus=has_gpus)

    def text(self, num_steps: int) -> str:
        """Return the time of `num_steps` steps, without start-up, checkpoints and validation."""
        hours = num_steps * self.step_s / 3600
        unit = "GPU" if self.has_gpus else "rank"
        return (
            f"Time: {pluralize(num_steps, 'step')} of {format_seconds(self.step_s)} ({self.origin}) are "
            f"{format_duration(3600 * hours)} on {pluralize(self.num_nodes, 'node')}: "
            f"{hours * self.num_devices:,.3g} {unit}-hours, {hours * self.num_nodes:,.3g} node-hours, without "
            "start-up, checkpoints and validation"
        )
