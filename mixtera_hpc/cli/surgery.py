"""What `resume` does when it is told to change what a run is: check, record, say what it means."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.dataplane.resume.run_edits import RunEdit
    from mixtera_hpc.launch.resume import ResumeRequest

__all__ = ["operate"]


def operate(folder: "RunFolder", before: "Config", after: "Config", change: "ResumeRequest") -> None:
    """Record the surgery that makes `after` of `before`; nothing when there is none. One process, while no attempt runs.

    Raises:
        LaunchError: no checkpoint to go back to is left, nothing would be dropped, or the run has all its steps.
        ConfigError: an expression does not parse or names what the index does not have.
        MixtureError: nothing would be left of the domains that are mixed.
    """
    from mixtera_hpc.dataplane.resume.run_edits import (
        pin_index_generation,
        read_run_edits,
        record_run_edit,
        run_edit_between,
    )

    operated = read_run_edits(folder.decisions)
    at_step = _checkpoint_before(folder, change.skip_steps, operated)
    surgery = run_edit_between(before, after, change.skip_steps, at_step, operated)
    if change.drop:
        _tell_dropped(
            pin_index_generation(before, folder.journal), pin_index_generation(after, folder.journal), change.drop
        )
    _check_steps_left(folder, at_step, after.training.num_steps)
    if surgery is None:
        return
    print(f"goes on from step {at_step}; recorded in {folder.decisions}", flush=True)
    record_run_edit(folder.decisions, surgery)


def _checkpoint_before(folder: "RunFolder", skip: tuple[int, int] | None, operated: Sequence["RunEdit"]) -> int:
    """The newest checkpoint's step, at or before the first one to skip; 0 when the run has none."""
    from mixtera_hpc.dataplane.resume.run_edits import is_abandoned
    from mixtera_hpc.errors import LaunchError

    states = [_state(path) for path in folder.checkpoints.glob("step_[0-9]*/dataplane.json")]
    steps = sorted(state["next_step"] for state in states if not is_abandoned(state, operated))
    usable = [step for step in steps if skip is None or step <= skip[0]]
    if steps and not usable and skip is not None:
        raise LaunchError(
            f"The data of step {skip[0]} cannot be skipped: the oldest checkpoint left is of step {steps[0]}.\n"
            f"  Skip from step {steps[0]} on, or keep more of them with checkpoint.keep."
        )
    return usable[-1] if usable else 0


def _check_steps_left(folder: "RunFolder", at_step: int, num_steps: int) -> None:
    from mixtera_hpc.errors import LaunchError

    if at_step >= num_steps:
        raise LaunchError(
            f"{folder.run_id} has all its steps: its checkpoint is of step {at_step}, and training.num_steps is {num_steps}.\n"
            f"  To train it longer: mixtera-hpc resume {folder.path} training.num_steps={2 * at_step}"
        )


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def _tell_dropped(before: "Config", after: "Config", drop: Sequence[str]) -> None:
    from mixtera_hpc.comm.communicator import Local
    from mixtera_hpc.dataplane.reading.source import count_samples, open_source
    from mixtera_hpc.errors import ConfigError, LaunchError

    try:
        had, has = count_samples(before), count_samples(after)
    except ConfigError as error:
        raise ConfigError(str(error).replace("query.where", "--drop")) from None
    if had == has:
        raise LaunchError(f"--drop {' --drop '.join(drop)} matches no sample that the run would still be served.")
    open_source(after, Local(), check=False)  # Refuses to leave nothing of what is mixed.
    print(f"drops {had - has:,} of {had:,} samples")
