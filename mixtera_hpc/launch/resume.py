"""Continuing a run in its folder: which keys may change, and which make it another run."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixtera_hpc.config.check import check
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import load_yaml
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import read_start
from mixtera_hpc.launch.prepare import replace_config
from mixtera_hpc.launch.status import JUST_SUBMITTED_S, run_statuses

__all__ = [
    "IDENTITY_KEYS",
    "NO_EDITS",
    "ResumeRequest",
    "amended_config",
    "check_ended",
    "check_resume",
    "record_config",
    "recorded_overrides",
    "was_submitted",
]

IDENTITY_KEYS = (
    *("data", "index.path", "query", "mixture"),
    *(
        f"dataplane.{name}"
        for name in (
            *("seq_len", "overlap_one_token", "global_batch_size", "chunk_steps", "feedback_lag", "seed", "shuffle"),
            *(
                "shuffle_window",
                "tokenizer",
                "vocab_size",
                "eos_id",
                "add_eos",
                "eos_token",
                "predict_across_documents",
            ),
        )
    ),
    *("training.num_layers", "training.num_heads", "training.embedding_dim"),
    *("run.name", "run.root", "run.id"),
)
"""What a run is: with any of these changed, the samples or the model of the steps to come would be another run's."""


FLAG_OF_KEY = {
    "dataplane.seed": "--change-seed",
    "dataplane.global_batch_size": "--change-batch-size",
    "query.drop": "--drop EXPRESSION",
}
"""Keys of the identity that may be changed all the same, with a flag that says it is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """What a user changes knowingly about what a run is."""

    skip_steps: tuple[int, int] | None = None
    """First and last step whose data is passed over."""
    drop: tuple[str, ...] = ()
    """Expressions; samples that match one are left out from now on."""
    seed: bool = False
    batch_size: bool = False

    @property
    def keys(self) -> dict[str, str]:
        """The keys that may change, each with the flag that allows it."""
        wished = {
            "--change-seed": self.seed,
            "--change-batch-size": self.batch_size,
            "--drop EXPRESSION": bool(self.drop),
        }
        return {key: flag for key, flag in FLAG_OF_KEY.items() if wished[flag]}


NO_EDITS = ResumeRequest()


def check_resume(old: Config, new: Config, change: ResumeRequest = NO_EDITS) -> None:
    """Refuse a changed identity, but for what is changed knowingly.

    Raises:
        LaunchError: names every key that differs, with both values; or a flag that nothing was changed for; or what would come
            back after it was dropped.
    """
    before, after = dict(_leaves(to_plain(old))), dict(_leaves(to_plain(new)))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    refused = [key for key in changed if any(key == name or key.startswith(f"{name}.") for name in IDENTITY_KEYS)]
    for key, flag in change.keys.items():
        if key not in changed:
            raise LaunchError(f"{flag} is given, but {key} stays {before.get(key)!r}.\n  Give {key}=<value> as well.")
    if change.drop and (back := [text for text in old.query.drop if text not in new.query.drop]):
        raise LaunchError(
            f"query.drop no longer has {back[0]!r}, but what was dropped stays dropped.\n  Leave query.drop to --drop, which adds "
            "to it."
        )
    refused = [key for key in refused if key not in change.keys]
    if refused:
        lines = "".join(f"\n  - {key}: {before.get(key)!r} before, {after.get(key)!r} now" for key in refused)
        raise LaunchError(
            f"A resumed run keeps what it trains on and what it trains; changed:{lines}\n  Leave "
            f"{'these' if len(refused) > 1 else 'this'} as {'they were' if len(refused) > 1 else 'it was'}, or start a "
            f"new run with mixtera-hpc submit or run.{_knowingly(refused)}"
        )


def _knowingly(refused: Sequence[str]) -> str:
    flags = [f"{FLAG_OF_KEY[key]} for {key}" for key in refused if key in FLAG_OF_KEY]
    return f"\n  To change it knowingly, from the last checkpoint on, add {', '.join(flags)}." if flags else ""


def amended_config(folder: RunFolder, overrides: Sequence[str], change: ResumeRequest = NO_EDITS) -> Config:
    """The recorded configuration with what `overrides` and `change` change, checked; other identity fields may not.

    The difference that the overrides make to a composition is laid over the recorded one, so files in `conf/` may have
    changed since, and it does not matter from which folder one resumes.

    Raises:
        LaunchError, ConfigError: see `check_resume` and `check`.
    """
    recorded = load_yaml(folder.config)
    old = from_plain(Config, recorded)
    new = old
    if overrides:
        typed = recorded_overrides(folder)
        amended = compose_plain(_merged(typed, overrides))
        plain = _laid_over(recorded, compose_plain(typed), amended)
        for override in overrides:
            _copy_value(amended, plain, _key(override).split("."))
        new = from_plain(Config, plain)
    new = replace(new, query=replace(new.query, drop=[*new.query.drop, *change.drop]))
    check_resume(old, new, change)
    check(new)
    return new


def record_config(folder: RunFolder, config: Config, overrides: Sequence[str]) -> None:
    """Record an amended configuration for the attempts to come; one process does it."""
    if to_plain(config) != load_yaml(folder.config):
        replace_config(folder, to_plain(config), overrides)


def check_ended(folder: RunFolder) -> int:
    """Refuse to continue a run that has not ended; returns its newest attempt, for `new_attempt(after=…)`.

    Raises:
        LaunchError: names the job; or somebody is starting an attempt right now.
    """
    newest = max(folder.attempts(), default=0)
    status = run_statuses([folder], datetime.now(UTC))[0]
    if newest and read_start(folder, newest) is None and _age_s(folder.attempt(newest)) < JUST_SUBMITTED_S:
        raise LaunchError(f"Attempt {newest} of {folder.run_id} is being started by somebody else.")
    if status.state.active:
        which = f"job {status.job_id}" if status.job_id else "this machine"
        raise LaunchError(
            f"Attempt {status.attempt} of {folder.run_id} is {status.state} as {which}; two attempts would write over "
            f"each other.\n  End it first: mixtera-hpc cancel {folder.path} --after-save"
        )
    return newest


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def was_submitted(folder: RunFolder) -> bool:
    """Whether the newest attempt was a Slurm job."""
    start = read_start(folder, max(folder.attempts(), default=0))
    return start is not None and start.kind == "slurm"


def recorded_overrides(folder: RunFolder) -> list[str]:
    """What was typed for this run so far, the last word on every key."""
    lines = folder.overrides.read_text().splitlines() if folder.overrides.is_file() else []
    return list({_key(line): line for line in lines}.values())


def _merged(typed: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """A key given again takes the place of what was given before."""
    again = {_key(word) for word in overrides}
    return [*(word for word in typed if _key(word) not in again), *overrides]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _laid_over(recorded: Any, before: Any, after: Any) -> Any:
    """`recorded` with every leaf replaced that differs between `before` and `after`."""
    if before == after:
        return recorded
    if not all(isinstance(part, Mapping) for part in (recorded, before, after)):
        return after
    merged = {key: value for key, value in recorded.items() if key in after or key not in before}
    for key, value in after.items():
        if key not in before or before[key] != value:
            merged[key] = _laid_over(recorded.get(key), before.get(key), value)
    return merged


def _copy_value(source: Any, target: Any, path: list[str]) -> None:
    """Copy the value at `path`, if there is one: a key set to its default shows no difference between compositions."""
    *above, name = path
    for part in above:
        if not (isinstance(source, Mapping) and isinstance(target, dict) and part in source and part in target):
            return
        source, target = source[part], target[part]
    if above and isinstance(source, Mapping) and isinstance(target, dict) and name in source:
        target[name] = source[name]


def _leaves(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(plain, Mapping) and plain:
        for key, value in plain.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, plain
