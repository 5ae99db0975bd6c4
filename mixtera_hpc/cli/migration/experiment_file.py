"""Write the experiment of a blend, and print what it mixes and how to use it."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.cli.migration.blend import Blend, BlendEntry
from mixtera_hpc.config.check import check_build
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.errors import ConfigError

__all__ = ["ExperimentFile", "split_overrides"]

_OVERRIDE = re.compile(r"(data|index|query|mixture|dataplane|training|run|job)(\.[\w-]+)+=.*", re.DOTALL)


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate sources from overrides `KEY=VALUE`, whose keys are those of a config."""
    overrides = [word for word in words if _OVERRIDE.fullmatch(word)]
    pairs = [word.partition("=") for word in overrides]
    return [word for word in words if word not in overrides], {key: value for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class ExperimentFile:
    """The file that `--out` names: `…/experiment/NAME.yaml` of a folder of configs.

    Raises:
        ConfigError: the path has another form, or the file exists.
    """

    path: Path

    def __post_init__(self) -> None:
        if self.path.suffix != ".yaml" or self.path.absolute().parent.name != "experiment":
            raise ConfigError(
                f"--out is {str(self.path)!r}, but an experiment is a file experiment/NAME.yaml of a folder of configs."
                f"\n  For example --out my_conf/experiment/{self.path.stem or 'blend'}.yaml."
            )
        if self.path.exists():
            raise ConfigError(f"--out is {str(self.path)!r}, which exists.\n  Choose another name, or remove the file.")

    def write(self, blend: Blend, source: str, overrides: Mapping[str, str]) -> None:
        """Write the experiment of a blend.

        Raises:
            ConfigError: it cannot be used as it is; nothing is written.
        """
        plain = _experiment(blend, overrides, self.path.absolute().stem)
        check_build(from_plain(Config, plain))
        comment = f"# Written by mixtera-hpc migrate {source}. Weights count {blend.counts}."
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"# @package _global_\n{comment}\n{dump_yaml(plain)}", encoding="utf-8")

    def next_commands(self) -> list[str]:
        """Return the commands that use the experiment."""
        conf = self.path.resolve().parent.parent
        commands = []
        if str(conf) not in os.environ.get("MIXTERA_CONF", "").split(os.pathsep):
            commands.append(f"export MIXTERA_CONF={shlex.quote(str(conf))}")
        name = f"experiment={shlex.quote(self.path.stem)}"
        return [*commands, f"mixtera-hpc index build {name}", f"mixtera-hpc plan {name}"]


def _experiment(blend: Blend, overrides: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the keys of the experiment."""
    sets: dict[str, Any] = {}
    for entry in blend.entries:
        sets[entry.name] = {"root": str(entry.root), "include": list(entry.include)}
        if entry.text_columns is not None and not {"data.text", f"data.sets.{entry.name}.text"} & overrides.keys():
            sets[entry.name]["text"] = _text_column(entry)
    data: dict[str, Any] = {"sets": sets}
    if blend.format is not None:
        data["format"] = blend.format
    elif all(entry.text_columns is None for entry in blend.entries):
        data["text"] = None
    plain: dict[str, Any] = {
        "data": data,
        "index": {"path": str(Path.cwd() / f"{name}.h5")},
        "mixture": {"unit": blend.unit, **_mixture(blend)},
        "run": {"name": name},
    }
    for key, value in overrides.items():
        _set(plain, key, value)
    return plain


def _text_column(entry: BlendEntry) -> str | None:
    """Return the column of the document.

    Raises:
        ConfigError: several columns may be it.
    """
    columns = entry.text_columns or ()
    if "text" in columns or not columns:
        return "text" if columns else None
    if len(columns) > 1:
        raise ConfigError(
            f"{entry.root} has the columns of text {', '.join(columns)}, and none of them is named text.\n"
            f"  Say which one is the document: add data.sets.{entry.name}.text={columns[0]} to the command."
        )
    return columns[0]


def _mixture(blend: Blend) -> dict[str, Any]:
    if all(entry.weight is None for entry in blend.entries):
        # By size: a share of the samples or tokens.
        return {"kind": "natural", "group_by": ["dataset"]}
    domains = [{"key": {"dataset": entry.name}, "weight": entry.weight} for entry in blend.entries]
    return {"kind": "static", "normalize": True, "domains": domains}


def _set(plain: dict[str, Any], key: str, text: str) -> None:
    """Set a key of the experiment to the value of an override."""
    import yaml  # type: ignore[import-untyped]  # Imported here to keep --help fast.

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text} has no valid value: {error}.\n  Put quotes around text.") from None
    *parents, last = key.split(".")
    mapping = plain
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"{key}: {parent} has no keys.\n  Correct the override.")
    mapping[last] = value
