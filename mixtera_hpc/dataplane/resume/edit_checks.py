"""Check and record the run edits of a `resume`: skipped steps, dropped samples, another seed, batch size or seq_len.

An edit takes effect at the checkpoint that the run continues from. It is recorded in the run's `decisions.jsonl` before
the next attempt begins.
"""

import logging
import textwrap
from collections.abc import Sequence

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.shared_index import select_subset
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.checkpoint_files import saved_states
from mixtera_hpc.dataplane.resume.run_edits import (
    RunEdit,
    dropped_expressions,
    is_abandoned,
    read_run_edits,
    record_run_edit,
    run_edit_between,
)
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.launch.attempts import is_own_program

__all__ = ["check_and_record_edit"]

_logger = logging.getLogger("mixtera_hpc")


def check_and_record_edit(
    folder: RunFolder,
    before: Config,
    after: Config,
    *,
    skip_steps: tuple[int, int] | None = None,
    drop: Sequence[str] = (),
) -> RunEdit | None:
    """Check, record and return the run edit that turns `before` into `after`; return None if nothing changes.

    One process calls this, between attempts.

    Args:
        before: The recorded configuration.
        after: The configuration of the coming attempts.
        skip_steps: First and last training step whose data is skipped.
        drop: Expressions whose samples are dropped in addition to those that the run has dropped before.

    Raises:
        LaunchError: No checkpoint is old enough, no sample would be dropped, or the run has done all its steps.
        ConfigError: An expression is not valid for the index.
        MixtureError: No sample would be left of a domain in the mixture.
    """
    earlier = read_run_edits(folder.decisions)
    # Only the reference trainer keeps its checkpoints in the folder of the run, and ends at `training.num_steps`.
    is_program = bool(after.job.command) or is_own_program(folder)
    at_step = _checkpoint_step(folder, skip_steps, earlier, is_program=is_program)
    edit = run_edit_between(before, after, earlier, at_step=at_step, skip_steps=skip_steps, drop=drop)
    if drop:
        _check_drop(pin_to_run(after, folder.journal), dropped_expressions(earlier), drop)
    if not is_program:
        _check_steps_remain(folder, at_step, after.training.num_steps)
    if edit is not None:
        record_run_edit(folder.decisions, edit)
        limit = " or an earlier one" if is_program else ""
        _logger.info("The run continues from step %d%s; the edit is recorded in %s.", at_step, limit, folder.decisions)
    return edit


def _checkpoint_step(
    folder: RunFolder, skip_steps: tuple[int, int] | None, earlier: Sequence[RunEdit], *, is_program: bool
) -> int:
    """Return the step of the newest usable checkpoint, at or before the first skipped step; 0 without checkpoints.

    A training program of the user's may keep its checkpoints anywhere. Those of all steps that it served are usable.
    """
    steps = sorted(state["next_step"] for state in saved_states(folder) if not is_abandoned(state, earlier))
    if is_program and not steps and folder.journal.is_file():
        end = max((attempt.served_end for attempt in History(folder.journal).attempts), default=0)
        return end if skip_steps is None else min(end, skip_steps[0])
    if skip_steps is None:
        return steps[-1] if steps else 0

    first = skip_steps[0]
    usable = [step for step in steps if step <= first]
    if steps and not usable:
        raise LaunchError(
            f"The data of step {first} cannot be skipped: the oldest checkpoint is of step {steps[0]}.\n"
            f"  Skip from step {steps[0]} on. To keep more checkpoints, set checkpoint.keep."
        )
    return usable[-1] if usable else 0


def _check_steps_remain(folder: RunFolder, at_step: int, num_steps: int) -> None:
    if at_step >= num_steps:
        raise LaunchError(
            f"{folder.run_id} has done all its steps: its checkpoint is of step {at_step}, and training.num_steps is "
            f"{num_steps}.\n  To train it longer: mixtera-hpc resume {folder.path} training.num_steps={2 * at_step}"
        )


def _check_drop(config: Config, dropped: Sequence[str], drop: Sequence[str]) -> None:
    """Log how many samples are dropped; raise if there are none, or if a domain of the mixture would be empty."""
    remaining = SampleSubset(drop=(*dropped, *drop))
    try:
        num_before = _count_samples(config, SampleSubset(drop=tuple(dropped)))
        num_after = _count_samples(config, remaining)
    except ConfigError as error:
        raise ConfigError(str(error).replace("query.where", "--drop")) from None
    if num_before == num_after:
        # Documents of a file can be thousands.
        texts = " --drop ".join(textwrap.shorten(text, 200) for text in drop)
        raise LaunchError(
            f"--drop {texts} matches none of the samples that the run serves.\n"
            "  Count matches with mixtera-hpc query query.where=EXPRESSION."
        )
    open_source(config, Local(), subset=remaining, check=False)  # Raises if the mixture has a domain without samples.
    _logger.info("%s of %s samples are dropped.", f"{num_before - num_after:,}", f"{num_before:,}")


def _count_samples(config: Config, subset: SampleSubset) -> int:
    """Return how many samples of `subset` all domains have together; opens only the index.

    Raises:
        ConfigError: `query.where` or a drop does not parse, or names what the index does not have.
    """
    with open_configured(config) as index:
        rows, _ = select_subset(config, index, subset).selection.table.totals()
    return int(rows.sum())
