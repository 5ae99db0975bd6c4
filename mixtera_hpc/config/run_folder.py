"""Every path of a run, in one place.

<root>/<name>/<run_id>/
  config.yaml overrides.txt manifest.json git.diff
  journal.jsonl                           the plan, chunk by chunk
  decisions.jsonl                         changes by users since the run began: edits and mixtures
  attempts/001/{submit.sh,job.json,exit.json,failure.json,config.yaml,saved}
  attempts/001/{claim,alive}              the one process that works on the attempt, and its counter
  attempts/001/{follow_up,checkpoint_before}         id of the job that waits; newest checkpoint at the start
  attempts/001/logs/batch.out rank_00000.{out,err}   beyond 255 ranks node_00000.{out,err}, lines labelled with ranks
  attempts/001/audit/rank_00000.jsonl     digests of what each rank handed to the trainer
  attempts/001/watchdog/stalled.json      the ranks that keep the others waiting, while the run makes no progress
  attempts/001/watchdog/rank_00000.json   heartbeat of a rank; rank_00000.txt: its stacks when the run stalled
  attempts/001/losses/rank_00000.bin      mean loss of every sequence that each rank recorded
  metrics/{attempts,steps,hosts,mixture,comm,data_end,validation}.jsonl tensorboard/
  checkpoints/step_00001000/ LATEST
  control/mixture.json                    a requested mixture
  control/{save,stop}                     a touched file is a request; `cancelled` ends the chain of attempts
  report/

The batch script (`launch/batch/*.sh`) names some of these files itself.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import LaunchError, did_you_mean

__all__ = ["PLANE_STATE_FILE", "RunFolder", "find_runs", "new_run_id", "runs_root"]

PLANE_STATE_FILE = "dataplane.npz"
"""File of a checkpoint that holds the state of the data plane."""


def new_run_id(config: dict[str, Any], now: datetime | None = None) -> str:
    """Return UTC time and four hex digits of the configuration, so that two runs started in one second differ."""
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=2).hexdigest()
    return f"{(now or datetime.now(UTC)).strftime('%Y%m%d-%H%M%S')}-{digest}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run. Creates nothing."""

    path: Path

    @classmethod
    def find(cls, name: str, root: Path) -> "RunFolder":
        """Return the run meant by `name`: a path, a run id, `<name>/<run_id>`, or a run name (its newest run).

        Raises:
            LaunchError: there is none; the message names near misses.
        """
        if cls(Path(name)).config.is_file():
            return cls(Path(name).resolve())
        runs = find_runs(root)
        matching = [run for run in runs if name in (run.run_id, f"{run.name}/{run.run_id}", run.name)]
        if matching:
            return max(matching, key=lambda run: run.run_id)
        known = sorted({run.run_id for run in runs} | {run.name for run in runs})
        raise LaunchError(f"No run {name!r} below {root}.{did_you_mean(name, known)}\n  See mixtera-hpc status.")

    @property
    def run_id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def name(self) -> str:
        """Name of the group of runs, `run.name`."""
        return self.path.parent.name

    @property
    def config(self) -> Path:
        """The resolved configuration. This file is what makes the folder a run."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides as typed, one per line."""
        return self.path / "overrides.txt"

    @property
    def manifest(self) -> Path:
        """Versions, host and commit that the run was started with."""
        return self.path / "manifest.json"

    @property
    def git_diff(self) -> Path:
        """Changes of the checkout that were not committed."""
        return self.path / "git.diff"

    @property
    def journal(self) -> Path:
        """The plans, written by rank 0: one line per attempt and chunk."""
        return self.path / "journal.jsonl"

    @property
    def decisions(self) -> Path:
        """Changes that people made to the run since it began."""
        return self.path / "decisions.jsonl"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    # Metrics

    @property
    def metrics(self) -> Path:
        """Folder of the metric files."""
        return self.path / "metrics"

    def metric(self, stream: str) -> Path:
        """Return the file of one stream of events, for example `steps`."""
        return self.metrics / f"{stream}.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.metrics / "tensorboard"

    # Checkpoints

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_plane_state(self, step: int) -> Path:
        """Return the file with the data plane's state in the checkpoint after `step` steps."""
        return self.checkpoint(step) / PLANE_STATE_FILE

    @property
    def latest_checkpoint(self) -> Path:
        """File with the name of the newest checkpoint's folder."""
        return self.checkpoints / "LATEST"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the checkpoints that exist, ascending."""
        names = (path.name for path in self.checkpoints.glob("step_*") if path.is_dir())
        return sorted(int(match.group(1)) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))

    # Control files

    @property
    def control(self) -> Path:
        """Folder of requests to a running job."""
        return self.path / "control"

    @property
    def stop_request(self) -> Path:
        """File whose existence asks the run to save and stop."""
        return self.control / "stop"

    @property
    def save_request(self) -> Path:
        """File whose existence asks the run to save and continue."""
        return self.control / "save"

    @property
    def cancelled(self) -> Path:
        """File whose existence forbids further attempts."""
        return self.control / "cancelled"

    @property
    def mixture_request(self) -> Path:
        """File with the requested mixture, which the run has not read yet."""
        return self.control / "mixture.json"

    # Attempts

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts that exist, ascending."""
        return sorted(int(path.name) for path in (self.path / "attempts").glob("[0-9]*") if path.is_dir())

    def attempt(self, number: int) -> Path:
        """Return the folder of one attempt, counted from 1."""
        return self.path / "attempts" / f"{number:03d}"

    def submit_script(self, attempt: int) -> Path:
        """Return the batch script of an attempt."""
        return self.attempt(attempt) / "submit.sh"

    def job_record(self, attempt: int) -> Path:
        """Return the file that says how an attempt was started."""
        return self.attempt(attempt) / "job.json"

    def exit_record(self, attempt: int) -> Path:
        """Return the file that says how an attempt ended."""
        return self.attempt(attempt) / "exit.json"

    def saved(self, attempt: int) -> Path:
        """Return the file that the ranks of an attempt create when they have saved and stop; see `mark_saved`."""
        return self.attempt(attempt) / "saved"

    def claim(self, attempt: int) -> Path:
        """Return the file that the one process or job creates that works on an attempt."""
        return self.attempt(attempt) / "claim"

    def alive_counter(self, attempt: int) -> Path:
        """Return the file in which the owner of an attempt counts while it lives."""
        return self.attempt(attempt) / "alive"

    def follow_up(self, attempt: int) -> Path:
        """Return the file with the id of the job that waits for the end of an attempt."""
        return self.attempt(attempt) / "follow_up"

    def failure(self, attempt: int) -> Path:
        """Return the file in which the first failing rank describes its error."""
        return self.attempt(attempt) / "failure.json"

    def replaced_config(self, attempt: int) -> Path:
        """Return the configuration that an attempt ran with, written when a later one replaces it."""
        return self.attempt(attempt) / "config.yaml"

    def logs(self, attempt: int) -> Path:
        """Return the folder of what the ranks of an attempt printed."""
        return self.attempt(attempt) / "logs"

    def batch_log(self, attempt: int) -> Path:
        """Return the output of the batch script of an attempt."""
        return self.logs(attempt) / "batch.out"

    def audit(self, attempt: int) -> Path:
        """Return the folder of the digests that the ranks of an attempt logged."""
        return self.attempt(attempt) / "audit"

    def audit_of_rank(self, attempt: int, rank: int) -> Path:
        """Return the digests that one rank logged."""
        return self.audit(attempt) / f"rank_{rank:05d}.jsonl"

    def audit_files(self, attempt: int) -> list[Path]:
        """Return the digest files of all ranks that exist, by rank."""
        return sorted(self.audit(attempt).glob("rank_*.jsonl"))

    def stall_report(self, attempt: int) -> Path:
        """Return the file that names the ranks at fault while an attempt does not get on."""
        return self.attempt(attempt) / "watchdog" / "stalled.json"

    def heartbeat(self, attempt: int, rank: int) -> Path:
        """Return the heartbeat of one rank."""
        return self.stall_report(attempt).with_name(f"rank_{rank:05d}.json")

    def stacks(self, attempt: int, rank: int) -> Path:
        """Return the stacks of one rank's threads when the attempt stalled."""
        return self.heartbeat(attempt, rank).with_suffix(".txt")

    def losses(self, attempt: int) -> Path:
        """Return the folder of the losses that the ranks of an attempt logged."""
        return self.attempt(attempt) / "losses"

    def losses_of_rank(self, attempt: int, rank: int) -> Path:
        """Return the losses of the sequences that one rank recorded."""
        return self.losses(attempt) / f"rank_{rank:05d}.bin"

    def ranks_with_losses(self, attempt: int) -> list[int]:
        """Return the ranks that logged losses, ascending."""
        names = (path.stem for path in self.losses(attempt).glob("rank_*.bin"))
        return sorted(int(name.removeprefix("rank_")) for name in names)


def runs_root() -> Path:
    """Return where runs are looked for by default: $MIXTERA_RUNS, or `runs` in the working folder, like `run.root`."""
    return Path(os.environ.get("MIXTERA_RUNS", "runs"))


def find_runs(root: Path) -> list[RunFolder]:
    """Return every run below `root`, oldest first."""
    runs = (RunFolder(path.parent.resolve()) for path in root.glob("*/*/config.yaml"))
    return sorted(runs, key=lambda run: run.run_id)
