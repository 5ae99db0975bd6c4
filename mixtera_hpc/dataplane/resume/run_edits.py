"""Run edits: deliberate changes of a run between two attempts, recorded before they take effect.

A run edit skips data steps, drops samples, or changes the seed, the global batch size or the length of sequences. It is
a line of `decisions.jsonl`, and begins a new stream version at the step that the next attempt continues from. What was
served before keeps its meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.config.batch_ramp import batch_stages
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.dataplane.recording.journal import append_line, read_lines
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import DataError

__all__ = [
    "RunEdit",
    "dropped_expressions",
    "is_abandoned",
    "read_run_edits",
    "record_run_edit",
    "run_edit_between",
    "subset_of_run",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEdit:
    """One change of a run, as a line of `decisions.jsonl` holds it."""

    at_step: int
    """The next attempt continues from this step or an earlier one. Checkpoints of later steps are abandoned."""
    skip: tuple[int, int] | None = None
    """First and last data step to skip."""
    changes: Mapping[str, tuple[Any, Any]]
    """Field of the identity → value before, value after."""


def record_run_edit(path: Path, edit: RunEdit) -> None:
    """Append an edit to `decisions.jsonl`. One process calls this, while no attempt runs."""
    append_line(path, {"kind": "run_edit", **msgspec.to_builtins(edit)})


def read_run_edits(path: Path | None) -> list[RunEdit]:
    """Return all edits of a run, oldest first."""
    if path is None or not path.exists():
        return []
    try:
        records = [line for line in read_lines(path) if line["kind"] == "run_edit"]
        return [msgspec.convert({k: v for k, v in line.items() if k != "kind"}, RunEdit) for line in records]
    except (KeyError, msgspec.ValidationError) as error:
        raise DataError(f"{path} has a line that is no decision ({error}).\n  Restore the file.") from None


def is_abandoned(state: Mapping[str, Any], edits: Sequence[RunEdit]) -> bool:
    """Return True if a later edit made the run continue from a step before the saved `state`.

    Args:
        state: the "json" part of a saved state.
        edits: all edits of the run.
    """
    # A state of another format version has no stream version here; loading it is refused later.
    num_applied = state.get("stream_version", {}).get("number", 0)
    return any(state["next_step"] > edit.at_step for edit in edits[num_applied:])


def dropped_expressions(edits: Sequence[RunEdit]) -> tuple[str, ...]:
    """Return the expressions whose samples a run no longer serves, oldest first."""
    # Each edit records all expressions up to then, so the last one wins.
    dropped: Sequence[str] = ()
    for edit in edits:
        if "drop" in edit.changes:
            _, dropped = edit.changes["drop"]
    return tuple(dropped)


def subset_of_run(folder: RunFolder | None, split: Split = "train") -> SampleSubset:
    """Return the samples that a run still serves; without a folder nothing is dropped."""
    edits = read_run_edits(folder.decisions if folder else None)
    return SampleSubset(split=split, drop=dropped_expressions(edits))


def run_edit_between(
    before: Config,
    after: Config,
    edits: Sequence[RunEdit],
    *,
    at_step: int,
    skip_steps: tuple[int, int] | None = None,
    drop: Sequence[str] = (),
) -> RunEdit | None:
    """Return the edit that turns `before` into `after`; None if nothing changes.

    Args:
        edits: earlier edits of the run.
        at_step: the step that the next attempt continues from.
        skip_steps: first and last training step whose data is skipped.
        drop: expressions whose samples are dropped in addition to those of earlier edits.
    """
    dropped = list(dropped_expressions(edits))
    old = _editable(before, dropped)
    new = _editable(after, [*dropped, *drop])
    changes = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    if not changes and skip_steps is None:
        return None

    skip = None
    if skip_steps is not None:
        # The user names training steps of the run as it is now; plans count data steps.
        version = StreamVersion.start(0).with_skips(edit.skip for edit in edits if edit.skip)
        skip = (version.data_step(skip_steps[0]), version.data_step(skip_steps[1]))
    return RunEdit(at_step=at_step, skip=skip, changes=changes)


def _editable(config: Config, dropped: list[str]) -> dict[str, Any]:
    """Return the fields of the identity that an edit may change."""
    plane = config.dataplane
    return {
        "drop": dropped,
        "seed": plane.seed,
        "global_batch_size": plane.global_batch_size,
        "batch_schedule": batch_stages(plane),
        "seq_len": plane.seq_len,
    }
