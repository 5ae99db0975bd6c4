"""An attempt of a run that a program of the user's makes by itself, without our launcher.

`DataPlane.open(folder=)` records it as the launcher does: `config.yaml` if it is missing, `job.json` at the start and
`exit.json` at the end. So `status`, `cancel`, `trace` and `report` know the run. Only rank 0 calls this.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.recording.journal import last_attempt
from mixtera_hpc.dataplane.steps.step_log import StepLog, StepTiming
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, create_attempt, end_attempt, record_start
from mixtera_hpc.launch.claim import Claim, is_owned_by_other
from mixtera_hpc.launch.prepare import with_absolute_paths
from mixtera_hpc.track.tracker import Tracker

__all__ = ["LoopLog", "OwnAttempt", "write_config_if_missing"]


def write_config_if_missing(folder: RunFolder, config: Config) -> None:
    """Write `config.yaml`, which makes the folder a run; its paths become absolute."""
    if folder.config.exists():
        return
    config = with_absolute_paths(config)
    config = replace(config, run=replace(config.run, id=folder.run_id))
    temporary = folder.config.with_name(f".{folder.config.name}.{os.getpid()}")
    with explain_write_errors(folder.config, "Nothing was served, and the folder is no run yet."):
        folder.path.mkdir(parents=True, exist_ok=True)
        temporary.write_text(dump_yaml(to_plain(config)))
        temporary.rename(folder.config)


class OwnAttempt:
    """The record of one attempt, from `claim` to `end`."""

    def __init__(self, folder: RunFolder, number: int) -> None:
        """Use `claim`."""
        self._folder = folder
        self._started = time.monotonic()
        self._claim = Claim(folder, number)
        self.number = number

    @classmethod
    def claim(cls, folder: RunFolder, config: Config, num_ranks: int) -> "OwnAttempt":
        """Claim the attempt after the last one for this process, and remove requests to earlier ones.

        Raises:
            LaunchError: another process trains in this folder, or starts an attempt at the same time.
        """
        newest = max(last_attempt(folder.journal), *folder.attempts(), 0)
        if is_owned_by_other(folder, newest):
            raise LaunchError(
                f"Attempt {newest} of {folder.run_id} is running in another process, and a run has one writer.\n  End "
                f"that process, or give this one a folder of its own. See mixtera-hpc status {folder.path}"
            )
        number = create_attempt(folder, newest)
        record_start(folder, number, replace(JobRecord.local(config, num_ranks), kind="program"))
        return cls(folder, number)

    def end(self, exit_code: int) -> None:
        """Record how the attempt ended."""
        self._claim.close()
        elapsed_s = int(time.monotonic() - self._started)
        end_attempt(self._folder, self.number, ExitRecord(exit_code=exit_code, elapsed_s=elapsed_s))


class LoopLog:
    """The metric events of a training loop that logs none itself: its attempts, and time and losses of its steps."""

    def __init__(self, tracker: Tracker, num_ranks: int, log_every: int) -> None:
        """Begin without steps; `log_every` steps make one event."""
        self._tracker = tracker
        self._steps = StepLog(tracker, num_ranks=num_ranks, log_every=log_every)
        self._begun: dict[int, float] = {}
        """Step → when its batch was asked for, of steps whose losses have not arrived."""
        self._waits: dict[int, float] = {}

    def log_attempt(self, facts: Mapping[str, Any]) -> None:
        """Log the start of an attempt; `facts` are fields of `AttemptEvent`."""
        # The loop alone knows how many steps it will train.
        self._tracker.log("attempts", {"num_steps": 0, **facts})

    def add_batch(self, step: int, data_wait_s: float) -> None:
        """Record that the batch of `step` was handed out after a wait."""
        self._begun[step] = time.monotonic() - data_wait_s
        self._waits[step] = data_wait_s

    def add_statistics(self, statistics: DomainStatistics) -> None:
        """Log a step that is reduced, or keep it until `log_every` steps are."""
        step = statistics.step
        # A step lasts until the next batch is asked for; the last one until now.
        end = self._begun.get(step + 1, time.monotonic())
        self._steps.add_timing(
            StepTiming(step=step, step_s=end - self._begun.pop(step), data_wait_s=self._waits.pop(step))
        )
        self._steps.add_statistics([statistics])

    def log_validation(self, statistics: DomainStatistics, mean_loss: float | None) -> None:
        """Log the losses of held-out samples."""
        num_tokens = statistics.num_tokens
        loss = [None if np.isnan(mean) else mean for mean in statistics.loss_mean.tolist()]
        self._tracker.log(
            "validation",
            {
                "step": statistics.step,
                "loss": mean_loss,
                "domain_loss": loss,
                "domain_tokens": num_tokens.tolist(),
                "num_nonfinite": int(statistics.num_nonfinite.sum()),
            },
        )

    def close(self) -> None:
        """Log what remains, and close the tracker."""
        self._steps.flush()
        self._tracker.close()
