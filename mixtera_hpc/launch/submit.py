"""Submit runs: from a checked configuration to a job in Slurm's queue."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.job_shape import python_of_ranks
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.launch.attempts import JobRecord, create_attempt, record_start
from mixtera_hpc.launch.prepare import prepare_run, with_absolute_paths
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script
from mixtera_hpc.launch.slurm.slurm_commands import SubmissionUnknownError, require_sbatch, sbatch

__all__ = [
    "Submitted",
    "check_submittable",
    "missing_account_message",
    "prepare_attempt",
    "record_job",
    "script_text",
    "submit_attempt",
    "submit_run",
    "undo_on_error",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job in the queue."""

    folder: RunFolder
    attempt: int
    job_id: str


def submit_run(config: Config, overrides: Sequence[str]) -> Submitted:
    """Prepare a new run's folder and submit its first attempt.

    Raises:
        LaunchError: There is no Slurm here, the cluster needs an account, or Slurm refuses the job.
    """
    check_submittable(config)
    folder = prepare_run(config, overrides, datetime.now(UTC))
    with undo_on_error(lambda: shutil.rmtree(folder.path)):
        return submit_attempt(folder, config)


def submit_attempt(folder: RunFolder, config: Config, after: int | None = None) -> Submitted:
    """Submit the next attempt of a run that has a folder.

    Args:
        folder: The run.
        config: The run's configuration.
        after: See `create_attempt`.

    Raises:
        LaunchError: See `submit_run`; or another process starts an attempt of this run at the same time.
    """
    check_submittable(config)
    attempt = prepare_attempt(folder, config, after)
    with undo_on_error(lambda: shutil.rmtree(folder.attempt(attempt))):
        job_id = sbatch(folder.submit_script(attempt))
    return record_job(folder, attempt, config, job_id)


def record_job(folder: RunFolder, attempt: int, config: Config, job_id: str) -> Submitted:
    """Record that Slurm has accepted a job as an attempt.

    Raises:
        SubmissionUnknownError: `job.json` cannot be written. The job is in the queue and needs its files.
    """
    try:
        record_start(folder, attempt, JobRecord.slurm(config, job_id))
    except LaunchError as error:
        reason = str(error).partition("\n")[0]
        raise SubmissionUnknownError(
            f"Slurm has accepted job {job_id}, but this could not be recorded: {reason}\n"
            f"  The job records itself when it starts. To submit again before that, first cancel it: scancel {job_id}"
        ) from None
    return Submitted(folder=folder, attempt=attempt, job_id=job_id)


def prepare_attempt(folder: RunFolder, config: Config, after: int | None = None) -> int:
    """Create the next attempt of a run, write its batch script, and return its number; see `submit_attempt`."""
    attempt = create_attempt(folder, after)
    with undo_on_error(lambda: shutil.rmtree(folder.attempt(attempt))):
        script = render_script(SbatchJob(config=config, folder=folder.path, attempt=attempt))
        with explain_write_errors(folder.submit_script(attempt), "No job was submitted."):
            folder.submit_script(attempt).write_text(script)
    return attempt


@contextmanager
def undo_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` if the block fails, unless Slurm may have accepted a job, which then needs its files.

    An interrupt of the user is no such failure: it may come while Slurm accepts the job.
    """
    try:
        yield
    except SubmissionUnknownError:
        raise
    except Exception:
        undo()
        raise


def script_text(config: Config, overrides: Sequence[str]) -> str:
    """Return the script of a run that makes its own folder when it starts. Nothing is written."""
    return render_script(SbatchJob(config=with_absolute_paths(config), overrides=overrides))


def missing_account_message(config: Config) -> str | None:
    """Return what to do if the cluster charges jobs to an account and none is set; None otherwise."""
    given = config.job.account or os.environ.get("SBATCH_ACCOUNT") or os.environ.get("SLURM_ACCOUNT")
    if given or not config.cluster.needs_account:
        return None
    return (
        f"job.account is not set, but cluster {config.cluster.name!r} charges every job to an account.\n  Set "
        "job.account=<your project>, or export SBATCH_ACCOUNT=<your project>."
    )


def check_submittable(config: Config) -> None:
    """Raise unless a job of `config` can be submitted from this machine.

    Raises:
        LaunchError: There is no Slurm here, or the cluster needs an account.
        ConfigError: The environment of the job does not exist.
    """
    if problem := missing_account_message(config):
        raise LaunchError(problem)
    require_sbatch()
    _check_environment(config)


def _check_environment(config: Config) -> None:
    """Refuse a virtual environment or a definition file that does not exist here, before a job waits in the queue."""
    environment = config.environment
    if environment.kind == "venv" and environment.python is None and not Path(python_of_ranks(config)).exists():
        raise ConfigError(
            f"environment.venv={environment.venv} has no bin/python, but environment=venv starts it on every node.\n"
            f"  Correct the path, or make it where all nodes see it: python3 -m venv {environment.venv}"
        )
    is_file = environment.kind == "container" and "/" in (environment.image or "")
    if is_file and str(environment.image).endswith(".toml") and not Path(str(environment.image)).is_file():
        raise ConfigError(
            f"environment.image={environment.image} does not exist, but environment=container needs an environment "
            "definition file there.\n  Correct the path; examples/container.toml is such a file."
        )
