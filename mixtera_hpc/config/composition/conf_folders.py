"""The folders that Hydra reads config files from, and the files in them."""

import os
from collections.abc import Iterator
from pathlib import Path

from mixtera_hpc.errors import ConfigError

__all__ = ["CONFIG_NAME", "check_file_names", "conf_dir", "conf_folders", "group_options", "own_files"]

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
    paths = (path for folder in conf_folders() for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in paths if path.is_file()})


def own_files() -> Iterator[tuple[Path, Path]]:
    """Yield every config file in the folders of `MIXTERA_CONF`, as folder and path below it."""
    shipped, *own = conf_folders()
    groups = sorted(path.name for path in shipped.iterdir() if path.is_dir())
    for folder in own:
        paths = [
            folder / f"{CONFIG_NAME}.yaml",
            *(path for group in groups for path in (folder / group).glob("*.yaml")),
        ]
        yield from ((folder, path.relative_to(folder)) for path in sorted(paths) if path.is_file())


def check_file_names() -> None:
    """Refuse files of the user that Hydra would ignore: of files with one name it reads only the first.

    Raises:
        ConfigError: two folders have a config file of the same name.
    """
    shipped = conf_dir()
    first_folder = {path.relative_to(shipped): shipped for path in shipped.rglob("*.yaml")}
    for folder, name in own_files():
        other = first_folder.setdefault(name, folder)
        if other != folder:
            raise ConfigError(
                f"{folder / name} would be ignored, because {other / name} has the same name and comes first.\n"
                "  Rename the file, e.g. with the name of your team in front."
            )
