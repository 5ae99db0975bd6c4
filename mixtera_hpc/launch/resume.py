"""Continue a run in its folder: decide which keys may change, and refuse changes of its data or its model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain, leaves, to_plain
from mixtera_hpc.config.files.journal_start import read_first_identity
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import load_yaml
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.prepare import replace_config

__all__ = [
    "IDENTITY_KEYS",
    "NO_EDITS",
    "ResumeRequest",
    "amended_config",
    "check_resume",
    "coming_step",
    "record_config",
    "recorded_overrides",
]

IDENTITY_KEYS = (
    "data",
    "index.path",
    "index.paths",
    "query",
    "mixture",
    "dataplane.seq_len",
    "dataplane.overlap_one_token",
    "dataplane.global_batch_size",
    "dataplane.batch_schedule",
    "dataplane.last_batch",
    "dataplane.chunk_steps",
    "dataplane.feedback_lag",
    "dataplane.seed",
    "dataplane.shuffle",
    "dataplane.window_bytes",
    "dataplane.lanes",
    "dataplane.pack",
    "dataplane.pack_group",
    "dataplane.balance",
    "dataplane.balance_group",
    "dataplane.sample_cost",
    "dataplane.tokenizer",
    "dataplane.vocab_size",
    "dataplane.eos_id",
    "dataplane.add_bos",
    "dataplane.add_eos",
    "dataplane.eos_token",
    "dataplane.special_tokens_in_text",
    "dataplane.chat_loss",
    "dataplane.predict_across_documents",
    "training.num_layers",
    "training.num_heads",
    "training.embedding_dim",
    "training.attention",
    "run.name",
    "run.root",
    "run.id",
)
"""The keys that identify a run. If one of them changed, later steps would have other samples or another model."""

COST_KEYS = ("data.cache_bytes", "data.materialize", "data.max_amplification", "data.tokens")
"""Keys below identity keys that change only what reading costs."""

SEQ_LEN = "dataplane.seq_len"
FLAG_OF_KEY = {
    "dataplane.seed": "--change-seed",
    "dataplane.global_batch_size": "--change-batch-size",
    "dataplane.batch_schedule": "--change-batch-size",
    SEQ_LEN: "--change-seq-len",
}
"""The identity keys that a flag allows to change, each with its flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """The changes to a run's identity that the user asks for explicitly."""

    skip_steps: tuple[int, int] | None = None
    """First and last training step whose data is skipped."""
    drop: tuple[str, ...] = ()
    """Query expressions. Samples that match one of them are no longer served."""
    change_seed: bool = False
    change_batch_size: bool = False
    change_seq_len: bool = False

    @property
    def has_edits(self) -> bool:
        """True if the data of the coming steps change."""
        return self != NO_EDITS

    @property
    def allowed_keys(self) -> dict[str, str]:
        """The identity keys that this request allows to change, each with its flag."""
        given = {
            "--change-seed": self.change_seed,
            "--change-batch-size": self.change_batch_size,
            "--change-seq-len": self.change_seq_len,
        }
        return {key: flag for key, flag in FLAG_OF_KEY.items() if given[flag]}


NO_EDITS = ResumeRequest()


def check_resume(old: Config, new: Config, request: ResumeRequest = NO_EDITS) -> None:
    """Refuse a changed identity key, unless `request` allows it.

    Raises:
        LaunchError: an identity key changed and is not allowed to, or the key of a given flag did not change.
    """
    before = dict(leaves(to_plain(old)))
    after = dict(leaves(to_plain(new)))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]

    if request.change_seq_len and old.mixture.unit == "samples":
        raise LaunchError(
            "--change-seq-len is given, but mixture.unit=samples serves whole samples, which no dataplane.seq_len "
            "cuts.\n  Remove it."
        )
    allowed = request.allowed_keys
    for key, flag in allowed.items():
        # A flag may allow several keys; the first one is named.
        if not any(other in changed for other, same in allowed.items() if same == flag):
            cure = "Give it another number" if key == SEQ_LEN else f"Give {key}=<value> as well"
            raise LaunchError(f"{flag} is given, but {key} is still {before.get(key)!r}.\n  {cure}, or remove it.")
    refused = [key for key in changed if _is_identity(key) and key not in request.allowed_keys]
    if refused:
        values = "".join(f"\n  - {key}: {before.get(key)!r} before, {after.get(key)!r} now" for key in refused)
        raise LaunchError(
            f"A resumed run must keep its data and its model, but these keys changed:{values}\n  Restore the recorded "
            f"values, or start a new run with mixtera-hpc submit or run.{_flag_hint(refused)}"
        )


def _is_identity(key: str) -> bool:
    return key not in COST_KEYS and any(key == name or key.startswith(f"{name}.") for name in IDENTITY_KEYS)


def _flag_hint(refused: Sequence[str]) -> str:
    flags = [f"{FLAG_OF_KEY[key]} for {key}" for key in refused if key in FLAG_OF_KEY]
    return f"\n  To allow a change from the last checkpoint on, add {', '.join(flags)}." if flags else ""


def amended_config(folder: RunFolder, overrides: Sequence[str], request: ResumeRequest = NO_EDITS) -> Config:
    """Return the recorded configuration with the changes of `overrides` and `request`, checked.

    The configuration is composed with and without the overrides, and only the difference is applied to the recorded
    one. So changes of `conf/` since then have no effect, and neither has the working folder.

    Raises:
        LaunchError: see `check_resume`.
        ConfigError: the result is not a valid configuration.
    """
    recorded = load_yaml(folder.config)
    old = from_plain(Config, recorded)
    new = old
    if overrides:
        typed = recorded_overrides(folder)
        before = compose_plain(typed)
        after = compose_plain(_merged(typed, overrides))
        plain = _apply_difference(recorded, before, after)
        # A key that is set to its default makes no difference between the compositions, but may differ from the record.
        for override in overrides:
            _copy_value(after, plain, _key(override).split("."))
        new = from_plain(Config, plain)
    # `dataplane.lanes=null` keeps the number of the run, which the journal has if the configuration has none.
    new = _with_lanes(new, old.dataplane.lanes)
    lanes = read_first_identity(folder.journal).lanes
    check_resume(_with_lanes(old, lanes), _with_lanes(new, lanes), request)
    check_run(new, coming_step(folder, new, request))
    return new


def coming_step(folder: RunFolder, config: Config, request: ResumeRequest = NO_EDITS) -> int:
    """Return the first step that the next attempt serves, as far as the names of the checkpoints say.

    The data plane checks again where it begins. A program of the user's may keep its checkpoints anywhere, so for it
    only the last stage of a batch ramp is known to come.
    """
    if config.job.command:
        return batch_schedule_of(config.dataplane).starts[-1]
    newest = max(folder.checkpoint_steps(), default=0)
    return newest if request.skip_steps is None else min(newest, request.skip_steps[0])


def _with_lanes(config: Config, lanes: int | None) -> Config:
    """Return `config` with a number of lanes, unless it has one."""
    if config.dataplane.lanes is not None:
        return config
    return replace(config, dataplane=replace(config.dataplane, lanes=lanes))


def record_config(folder: RunFolder, config: Config, overrides: Sequence[str]) -> None:
    """Record an amended configuration for the next attempts. One process calls this."""
    if to_plain(config) != load_yaml(folder.config):
        replace_config(folder, to_plain(config), overrides)


def recorded_overrides(folder: RunFolder) -> list[str]:
    """Return the overrides that were typed for this run so far, only the last one of each key."""
    lines = folder.overrides.read_text().splitlines() if folder.overrides.is_file() else []
    return list({_key(line): line for line in lines}.values())


def _merged(typed: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return all overrides; a new override replaces an earlier one of the same key."""
    given_again = {_key(word) for word in overrides}
    return [*(word for word in typed if _key(word) not in given_again), *overrides]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _apply_difference(recorded: Any, before: Any, after: Any) -> Any:
    """Return `recorded`, updated with each leaf of `after` that differs from `before`."""
    if before == after:
        return recorded
    if not all(isinstance(value, Mapping) for value in (recorded, before, after)):
        return after
    # Drop the keys that the difference removes.
    merged = {key: value for key, value in recorded.items() if key in after or key not in before}
    for key, value in after.items():
        if key not in before or before[key] != value:
            merged[key] = _apply_difference(recorded.get(key), before.get(key), value)
    return merged


def _copy_value(source: Any, target: Any, path: list[str]) -> None:
    """Copy the value at `path` from one nested mapping to another, if both have the path."""
    *above, name = path
    for part in above:
        if not (isinstance(source, Mapping) and isinstance(target, dict) and part in source and part in target):
            return
        source = source[part]
        target = target[part]
    if above and isinstance(source, Mapping) and isinstance(target, dict) and name in source:
        target[name] = source[name]
