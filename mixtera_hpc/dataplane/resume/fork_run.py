"""Fork a run: a new run that continues a checkpoint of another one on another mixture.

The new run has a folder of its own. It begins with what the parent recorded: its journal, its attempts and metrics, and
the checkpoint. So `trace`, `verify` and `report` cover the parent's part as well. A line of the journal names the
parent. The mixture changes by a decision, as `mixture set` makes one. Files that are never written again are linked.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, MixtureConfig, TrainingConfig
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision, requested_mixture
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.recording.journal import FORK_KIND, append_line, read_lines
from mixtera_hpc.dataplane.resume.checkpoint_files import find_damage
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run, with_sizes_of_identity
from mixtera_hpc.errors import ConfigError, MixtureError, SavedAndStopped
from mixtera_hpc.launch.attempts import ExitRecord, end_attempt
from mixtera_hpc.launch.prepare import prepare_run

__all__ = ["Fork", "ForkPoint", "fork_runs", "open_fork_point"]

METRICS = ("attempts", "steps", "mixture", "comm", "validation", "data_end")
ATTEMPT_FILES = ("job.json", "exit.json")
ATTEMPT_FOLDERS = ("audit", "losses")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkPoint:
    """A checkpoint that runs can be forked from."""

    parent: RunFolder
    config: Config
    """The parent's recorded configuration."""
    state: PlaneState

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.state.next_step

    @property
    def first_chunk(self) -> int:
        """The first chunk that a new mixture can serve: the checkpoint holds the plan of the one before."""
        return self.state.plan.chunk + 1

    @property
    def first_step(self) -> int:
        """The first step of that chunk."""
        plan = self.state.plan
        return max(self.state.stream_version.step_at(plan.first_step + plan.num_steps), self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """One run to be forked."""

    label: str
    """The end of the id of the new run."""
    file: Path
    """File of the mixture, for messages."""
    content: Any
    """Mixture of the fork, as YAML: the keys below `mixture:`."""
    training: TrainingConfig
    """Settings of its trainer: number of steps and decay."""


def open_fork_point(parent: RunFolder, step: int) -> ForkPoint:
    """Read the checkpoint after `step` steps of a run.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged.
    """
    steps = parent.checkpoint_steps()
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"{parent.path} has no checkpoint of step {step}. It has: {known}.\n"
            "  Choose one of them. checkpoint.every_steps and checkpoint.keep say which ones a run keeps."
        )
    damage = find_damage(parent.checkpoint(step))
    if damage is not None:
        raise ConfigError(f"The checkpoint of step {step} cannot be used: {damage}.\n  Choose another step.")
    state = PlaneState.from_array(np.fromfile(parent.checkpoint_plane_state(step), np.uint8))
    # Later edits of the parent are no edits of the new run.
    config = with_sizes_of_identity(load_config(parent.config), state.identity)
    return ForkPoint(parent=parent, config=config, state=state)


def fork_runs(point: ForkPoint, forks: Sequence[Fork], now: datetime) -> list[RunFolder]:
    """Make the folders of new runs that continue `point`. Price: one open of the index, and links to files.

    All forks are checked before the first folder is made.

    Raises:
        ConfigError: a mixture is invalid or changes more than the weights, or a new run exists.
        MixtureError: the data of the run cannot be served in these proportions.
    """
    mixtures = _checked_mixtures(point, forks)
    configs = [_checked_config(point, fork) for fork in forks]
    return [_make_run(point, config, mixture, now) for config, mixture in zip(configs, mixtures, strict=True)]


def _checked_config(point: ForkPoint, fork: Fork) -> Config:
    run_id = f"{point.parent.run_id}-s{point.step}-{fork.label}"
    config = replace(point.config, training=fork.training, run=replace(point.config.run, id=run_id))
    check_run(config, point.state.stream_version.data_step(point.step))
    folder = point.parent.path.with_name(run_id)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists, and --set makes a run of this name.\n"
            "  Rename the file of --set, or remove the run if it is not needed."
        )
    return config


def _make_run(point: ForkPoint, config: Config, mixture: MixtureConfig, now: datetime) -> RunFolder:
    # A later `resume` with changes composes the configuration from these words again.
    words = point.parent.overrides.read_text().splitlines() if point.parent.overrides.is_file() else []
    child = prepare_run(config, words, now)

    _link_attempts(point.parent, child)
    for name in METRICS:
        _copy_events(point, name, child)
    _copy_if_file(point.parent.journal, child.journal)
    origin = {"kind": FORK_KIND, "parent": str(point.parent.path), "step": point.step, "chunk": point.first_chunk}
    append_line(child.journal, origin)
    _end_at_checkpoint(child, config)
    for line in _decisions_until_checkpoint(point):
        append_line(child.decisions, line)
    append_line(child.decisions, MixtureDecision(chunk=point.first_chunk, mixture=mixture).to_dict())
    # The checkpoint comes last: without it the new run would begin at step 0.
    _link_tree(point.parent.checkpoint(point.step), child.checkpoint(point.step))
    child.latest_checkpoint.write_text(child.checkpoint(point.step).name + "\n")
    return child


def _checked_mixtures(point: ForkPoint, forks: Sequence[Fork]) -> list[MixtureConfig]:
    """Return the mixtures of new runs, checked against the data of their parent."""
    config = pin_to_run(point.config, point.parent.journal)
    source = open_source(config, Local(), subset=subset_of_run(point.parent), check=False)
    mixtures = []
    for fork in forks:
        try:
            mixture = requested_mixture(config.mixture, fork.content)
            make_mixer(mixture, source.mixture_context, learn=False).close()
        except (ConfigError, MixtureError) as error:
            raise type(error)(f"--set {fork.file}: {error}") from None
        mixtures.append(mixture)
    return mixtures


def _copy_events(point: ForkPoint, stream: str, child: RunFolder) -> None:
    """Copy the events of the parent up to the checkpoint to the new run."""
    path = point.parent.metric(stream)
    if not path.is_file():
        return
    ends = {"mixture": point.first_step, "validation": point.step + 1, "data_end": point.step + 1}
    end = ends.get(stream, point.step)
    with child.metric(stream).open("wb") as file:
        for line in path.read_bytes().splitlines(keepends=True):
            # Readers skip damaged lines, with a warning.
            with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                if msgspec.json.decode(line, type=_Event).step < end:
                    file.write(line)


def _end_at_checkpoint(child: RunFolder, config: Config) -> None:
    """Record that the parent's last attempt saved at the checkpoint, and that the run has the steps of the new one."""
    attempts = child.attempts()
    if attempts:
        end_attempt(child, max(attempts), ExitRecord(exit_code=SavedAndStopped.exit_code, elapsed_s=0))
    path = child.metric("attempts")
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if lines:
        last = msgspec.json.decode(lines[-1]) | {"num_steps": config.training.num_steps}
        path.write_bytes(b"\n".join([*lines[:-1], msgspec.json.encode(last), b""]))


class _Event(msgspec.Struct):
    step: int


def _decisions_until_checkpoint(point: ForkPoint) -> list[Mapping[str, Any]]:
    """Return the lines of `decisions.jsonl` that the checkpoint contains."""
    if not point.parent.decisions.is_file():
        return []
    edits = 0
    decisions: list[Mapping[str, Any]] = []
    for line in read_lines(point.parent.decisions):
        if line["kind"] == "run_edit":
            edits += 1
            # The state says how many edits it contains.
            if edits <= point.state.stream_version.number:
                decisions.append(line)
        elif line["kind"] != "mixture" or line["chunk"] < point.first_chunk:
            decisions.append(line)
    return decisions


def _link_attempts(parent: RunFolder, child: RunFolder) -> None:
    """Give the new run what `trace` and `status` read about the parent's attempts."""
    for number in parent.attempts():
        target = child.attempt(number)
        target.mkdir(parents=True)
        for name in ATTEMPT_FILES:
            _copy_if_file(parent.attempt(number) / name, target / name)
        for name in ATTEMPT_FOLDERS:
            if (parent.attempt(number) / name).is_dir():
                _link_tree(parent.attempt(number) / name, target / name)


def _link_tree(source: Path, target: Path) -> None:
    """Copy a folder; its files are linked where the file system allows it."""
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _copy_if_file(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copy2(source, target)
