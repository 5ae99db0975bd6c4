"""The folders that Hydra reads config files from."""

import os
from pathlib import Path

from mixtera_hpc.errors import ConfigError

__all__ = ["CONFIG_NAME", "conf_dir", "conf_folders", "group_options"]

CONFIG_NAME = "config"
"""Name of the primary config file."""


def conf_dir() -> Path:
    """Return the folder of the shipped configs: `conf/` beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise ConfigError(
        f"The shipped configs are missing: no {CONFIG_NAME}.yaml in {package / 'conf'}. Reinstall mixtera-hpc."
    )


def conf_folders() -> list[Path]:
    """Return all folders with configs: the shipped one, then those of the user (`MIXTERA_CONF=dir:dir`).

    Raises:
        ConfigError: `MIXTERA_CONF` names something that is not a folder.
    """
    own = [Path(folder).resolve() for folder in os.environ.get("MIXTERA_CONF", "").split(":") if folder]
    for folder in own:
        if not folder.is_dir():
            raise ConfigError(f"MIXTERA_CONF names {folder}, which is not a folder.\n  Correct it, or unset it.")
    return [conf_dir(), *own]


def group_options(group: str) -> list[str]:
    """Return the names of the config files of one group, in all folders."""
    return sorted({path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")})
