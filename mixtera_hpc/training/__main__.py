"""`python -m mixtera_hpc.training`: the reference trainer as a plain Hydra application, for sweeps with any launcher.

    python -m mixtera_hpc.training data.root=/data …
    python -m mixtera_hpc.training -m hydra/launcher=submitit_slurm dataplane.seed=1,2,3 …

`mixtera-hpc run` and `submit` do the same without Hydra's output folders. Here, Hydra's output folder of a job records
the run's folder, so a job that Slurm requeues continues the same run. Hydra's launcher cannot sweep the number of
nodes.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import from_omegaconf, prepare_application
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.files.file_trust import deny_world_write
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.control import block_time_limit_signal
from mixtera_hpc.errors import ConfigError, MixteraError
from mixtera_hpc.launch.attempts import JobRecord, create_attempt, record_start, start_local_attempt
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.training.run_attempt import Attempt, check_trained_here, run_attempt

__all__ = ["main"]

POINTER = "run_folder"
"""File in Hydra's output folder that holds the path of the run's folder."""


def main() -> None:
    """Let Hydra compose the configuration and run the job, or with `-m` many jobs."""
    decorate = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    decorate(_run_job)()


def _run_job(composed: Any) -> None:
    """Run one job on every rank. **Collective.**

    A failure exits the process, so that no launcher takes the job for successful.
    """
    block_time_limit_signal()
    settings = HydraConfig.get()
    output = Path(settings.runtime.output_dir)
    overrides = list(settings.overrides.task)

    def prepare(num_ranks: int) -> Attempt:
        config = from_plain(Config, from_omegaconf(composed))
        check_run(config)
        check_trained_here(config)
        folder = _run_folder(config, output, overrides)
        return Attempt(folder=folder, number=_start_attempt(folder, config, num_ranks))

    try:
        code = run_attempt(str(composed.dataplane.comm), prepare)
    except MixteraError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    if code:
        sys.stdout.flush()
        sys.exit(code)  # Hydra would catch an exception and report success to its launcher, but not SystemExit.


def _run_folder(config: Config, output: Path, overrides: Sequence[str]) -> RunFolder:
    """Return the folder of the run that this job began before it was requeued, or of a new run."""
    pointer = output / POINTER
    if pointer.is_file():
        return RunFolder(Path(pointer.read_text()))
    folder = prepare_run(config, overrides, datetime.now(UTC))
    pointer.write_text(str(folder.path))
    return folder


def _start_attempt(folder: RunFolder, config: Config, num_ranks: int) -> int:
    """Claim the next attempt and record who runs it: the Slurm job of Hydra's launcher, or this process."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        return start_local_attempt(folder, config, ranks=num_ranks)

    number = create_attempt(folder)
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    record_start(folder, number, replace(JobRecord.slurm(config, job_id), nodes=nodes, ranks=num_ranks))
    return number


def _prepare_command_line() -> None:
    """Let Hydra find our schema and the user's configs, and report mistakes of the command line as every verb does."""
    try:
        sys.argv[1:] = prepare_application(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    deny_world_write()
    _prepare_command_line()
    main()
