"""Continue a run: check that it has ended, record what changes, then run or submit its next attempt.

Everything that can be checked is checked before anything is recorded, so a refused change leaves the run as it was.
Only if sbatch itself refuses the job, the recorded changes stay; then `mixtera-hpc resume RUN` submits it with them.
"""

from collections.abc import Collection, Sequence

from mixtera_hpc.config.batch_memory import check_batch_memory
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.attempts import start_local_attempt
from mixtera_hpc.launch.newest_attempt import check_ended, check_trained_by_launcher
from mixtera_hpc.launch.resume import NO_EDITS, ResumeRequest, amended_config, coming_step, record_config
from mixtera_hpc.launch.submit import Submitted, check_submittable, submit_attempt
from mixtera_hpc.training.model_memory import check_model_memory
from mixtera_hpc.training.run_attempt import Attempt, check_trained_here, run_attempt

__all__ = ["check_num_ranks", "continue_run", "edit_program_run", "submit_next_attempt"]


def continue_run(
    folder: RunFolder, overrides: Sequence[str] = (), request: ResumeRequest = NO_EDITS, attempt: int | None = None
) -> int:
    """Train the next attempt of a run in this process and the other ranks; return the exit code. **Collective.**

    Args:
        folder: The run.
        overrides: Hydra overrides on top of the recorded configuration.
        request: Changes to what identifies the run.
        attempt: The attempt that a batch script has made already. Then nothing changes and nothing is recorded.

    Raises:
        LaunchError: The run has not ended, or a change is not allowed.
        ConfigError: The amended configuration is not valid.
    """
    config = amended_config(folder, overrides, request)
    check_trained_here(config)

    def prepare(num_ranks: int) -> Attempt:
        if attempt is not None:
            return Attempt(folder=folder, number=attempt)
        check_trained_by_launcher(folder)
        newest = check_ended(folder)
        check_num_ranks(config, num_ranks, coming_step(folder, config, request))
        _record_changes(folder, config, overrides, request)
        number = start_local_attempt(folder, config, ranks=num_ranks, after=newest)
        return Attempt(folder=folder, number=number)

    return run_attempt(config.dataplane.comm, prepare)


def submit_next_attempt(folder: RunFolder, overrides: Sequence[str], request: ResumeRequest) -> Submitted:
    """Submit the next attempt of a run to Slurm.

    Raises:
        LaunchError: The run has not ended, a change is not allowed, or Slurm refuses the job.
        ConfigError: The amended configuration is not valid.
    """
    check_trained_by_launcher(folder)
    newest = check_ended(folder)
    config = amended_config(folder, overrides, request)
    check_submittable(config)
    _record_changes(folder, config, overrides, request)
    return submit_attempt(folder, config, after=newest)


def edit_program_run(folder: RunFolder, overrides: Sequence[str], request: ResumeRequest) -> list[str]:
    """Record the edit of a run that a training program of the user's continues; return what to set in the program.

    Raises:
        LaunchError: The run has not ended, or a change is not allowed.
        ConfigError: The amended configuration is not valid.
    """
    config = amended_config(folder, overrides, request)
    check_ended(folder)
    changes = _record_changes(folder, config, overrides, request)
    return [override for override in overrides if override.partition("=")[0].removeprefix("dataplane.") in changes]


def check_num_ranks(config: Config, num_ranks: int, first_step: int = 0) -> None:
    """Raise `ConfigError` unless every global batch from `first_step` on can be divided among this number of ranks.

    What a rank gets must fit into the memory of its node.
    """
    # Imported here because it imports h5py, which `--help` does not need.
    from mixtera_hpc.dataplane.reading.batches import BatchSlice, check_shared_evenly

    num_groups = BatchSlice.of(config.dataplane, 0, num_ranks).num_groups
    check_shared_evenly(config.dataplane, num_groups, f"{num_ranks} ranks", first_step=first_step)
    if config.mixture.unit == "tokens":
        # The ranks of this node are counted when they open the data plane.
        check_batch_memory(config.dataplane, num_groups)
        check_model_memory(config, num_groups)


def _record_changes(
    folder: RunFolder, config: Config, overrides: Sequence[str], request: ResumeRequest
) -> Collection[str]:
    """Record the run edit that leads to `config`, then `config` itself; return the changed fields of the identity.

    One process calls this.
    """
    # Imported here because it imports h5py, which `--help` does not need.
    from mixtera_hpc.dataplane.resume.edit_checks import check_and_record_edit

    recorded = load_config(folder.config)
    edit = check_and_record_edit(folder, recorded, config, skip_steps=request.skip_steps, drop=request.drop)
    record_config(folder, config, overrides)
    return edit.changes if edit else ()
