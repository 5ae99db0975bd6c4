"""Hydra's compose at the edge: overrides in, one frozen `Config` out. Nothing below this file knows OmegaConf."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.config.check import check
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = [
    "compose",
    "compose_plain",
    "conf_dir",
    "conf_folders",
    "dump_yaml",
    "from_omegaconf",
    "load_config",
    "load_yaml",
    "read_yaml",
    "search_path",
]

CONFIG_NAME = "config"
OPEN_KEYS = ("data.properties", "data.sets", "mixture.algorithm", "cluster.env", "cluster.sbatch")
"""Mappings whose keys are the user's: they are set without Hydra's `+`."""
TEXT_KEYS = ("query.where", "job.constraint", "job.comment", "job.time")
"""Keys whose value is text, whatever it looks like: taken as typed, without a second pair of quotes for Hydra."""
_DEFAULTS = {"cluster": "local", "data": "generic"}
"""The file of a group that says what another one leaves out."""
_IN_QUOTES = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)


def conf_dir() -> Path:
    """The folder of shipped configs: `conf/` beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise ConfigError(
        f"The shipped configs are missing: no {CONFIG_NAME}.yaml in {package / 'conf'}. Reinstall mixtera-hpc."
    )


def conf_folders() -> list[Path]:
    """Where configs are looked for: the shipped ones, then a team's own (`MIXTERA_CONF=dir:dir`).

    Raises:
        ConfigError: `MIXTERA_CONF` names what is not a folder.
    """
    own = [Path(p).resolve() for p in os.environ.get("MIXTERA_CONF", "").split(":") if p]
    for folder in own:
        if not folder.is_dir():
            raise ConfigError(f"MIXTERA_CONF names {folder}, which is not a folder.\n  Mend it, or unset it.")
    return [conf_dir(), *own]


def search_path() -> list[str]:
    """The override that makes Hydra look into a team's own configs as well."""
    own = conf_folders()[1:]
    return [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]"] if own else []


def compose(overrides: Sequence[str]) -> Config:
    """Compose the primary config with Hydra `overrides` and check it.

    Raises:
        ConfigError: an override that does not parse, an unknown group, key or value, or any failed check.
    """
    config = from_plain(Config, compose_plain(overrides))
    check(config)
    return config


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose to nested dicts, resolved but not converted; see `compose`."""
    import yaml  # type: ignore[import-untyped]
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="mixtera-hpc"):
        try:
            composed = hydra_compose(CONFIG_NAME, overrides=[*search_path(), *map(_typed, overrides)])
            if "experiment" in composed:
                raise ConfigError(
                    "The experiment's keys are below `experiment`. Begin its file with the line `# @package _global_`, which "
                    "puts them at the top."
                )
            return from_omegaconf(composed)
        except yaml.YAMLError as error:
            raise ConfigError(f"A config file is no YAML: {error}") from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_explain(error, overrides)) from None


def from_omegaconf(node: Any) -> dict[str, Any]:
    """Resolve a DictConfig into plain dicts, lists and scalars, keeping `???` for the check that names missing keys."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True)
    return {str(k): v for k, v in plain.items() if k != "hydra"} if isinstance(plain, dict) else {}


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file written by `dump_yaml` (`config.yaml` of a run folder): values as they are, nothing is resolved.

    Raises:
        ConfigError: it is missing, or no YAML.
    """
    import yaml

    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.\n  Give the folder of a run, which has a config.yaml."
        ) from None
    return plain if isinstance(plain, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that a person wrote, as Hydra reads those of `conf/`: 2e9 is a number, `${…}` is resolved.

    Raises:
        ConfigError: it is missing, no YAML, or no mapping.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}.\n  Give a YAML file of `key: value` lines.") from None
    if not isinstance(plain, dict) or not plain:
        raise ConfigError(f"{path} has no keys.\n  Give a YAML file of `key: value` lines.")
    return {str(key): value for key, value in plain.items()}


def dump_yaml(plain: dict[str, Any]) -> str:
    """The text `load_yaml` reads back; a `${…}` in it is the shell's, and stays."""
    import yaml

    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))


def load_config(path: Path) -> Config:
    """The configuration a run was made with.

    Raises:
        ConfigError: the file was written by another version, or by hand; every problem is named.
    """
    return from_plain(Config, load_yaml(path))


def _typed(override: str) -> str:
    """An override as users write it → as Hydra wants it: a key that no file in `conf/` mentions is set all the same."""
    key, _, value = override.partition("=")
    if key in TEXT_KEYS and value != "null" and not value.startswith("${") and not _IN_QUOTES.fullmatch(value):
        escaped = value.replace('"', '\\"')
        return f'{key}="{escaped}"'
    return f"++{override}" if _inside_open_key(key) or ("." in key and key in _known_keys(Config)) else override


def _inside_open_key(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OPEN_KEYS)


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error).strip()
    if match := re.search(r"Environment variable '(\w+)' not found", text):
        name = match.group(1)
        key = re.search(r"full_key: (\S+)", text)
        where = f"{key.group(1)} needs" if key else "The configuration needs"
        return f"{where} the environment variable {name}, which is not set.\n  Set {name}, or give {key.group(1) if key else 'the key'}=<value>."
    if match := re.search(r"Interpolation key '(\w+)\.(\S+)' not found", text):
        group, leaf = match.groups()
        return f"{group}.{leaf} is not set. Set it, or begin the file in {group}/ with `defaults: [{_DEFAULTS.get(group, 'default')}]`."
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match.group(1)} is missing. Set it on the command line or in a config file."
    if match := re.search(r"Key '(\w+)' is not in struct\s+full_key: (\S+)", text):
        return f"{match.group(2)} is not a known key.{_near_keys(match.group(2))}"
    if match := re.search(r"Could not override '([\w.]+)'", text):
        return f"{match.group(1)} is not a known key.{_near_keys(match.group(1))}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        return f"{group}={option} does not exist.{did_you_mean(option, _options(group))}"
    return _unparsable(overrides) or text + (f"\n  Overrides were: {' '.join(overrides)}" if overrides else "")


def _unparsable(overrides: Sequence[str]) -> str | None:
    """What to say of the first override that is not in Hydra's grammar; None when all are."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        if override.startswith("="):
            return f"{override!r} is not an override. Write key=value, e.g. dataplane.seed=3."
        try:
            OverridesParser.create().parse_override(_typed(override))
        except HydraException:
            key, _, value = override.partition("=")
            if not value:
                return f"{override!r} is not an override. Write key=value, e.g. dataplane.seed=3."
            if value.startswith("~"):
                return f"{override!r}: the shell leaves ~ as it is behind a =. Write {key}=$HOME{value[1:]}"
            if "." in key and not _inside_open_key(key) and key not in _known_keys(Config):
                return f"{key} is not a known key.{_near_keys(key)}"
            return f"{override!r} is not a Hydra override. Put its value in quotes of its own: '{key}=\"{value}\"'"
    return None


def _near_keys(key: str) -> str:
    known = list(_known_keys(Config))
    leaf = key.rpartition(".")[2]
    return _same_leaf(leaf, known) or did_you_mean(key, known)


def _same_leaf(leaf: str, known: list[str]) -> str:
    same = [repr(k) for k in known if k.rpartition(".")[2] == leaf]
    return f" Did you mean {' or '.join(same)}?" if same else ""


def _known_keys(cls: Any, path: str = "") -> list[str]:
    import dataclasses
    import typing

    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        full = f"{path}.{name}" if path else name
        keys.append(full)
        if dataclasses.is_dataclass(hint):
            keys += _known_keys(hint, full)
    return keys


def _options(group: str) -> list[str]:
    return sorted({path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")})
