"""Make Hydra search our config folders, and let a chosen group replace what an experiment sets in it.

Hydra merges an experiment after all groups: in `experiment=demo mixture=unimax` the values of the experiment would
change the file that the user asked for. Here the chosen file wins. If the command line chooses a file for a
group, everything that the experiment sets inside this group is ignored; its other groups stay. For this, Hydra gets an
additional config source, placed before all others. It serves the files of `experiment/` without the keys of the chosen
groups.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from mixtera_hpc.config.composition.conf_folders import conf_folders

__all__ = ["ExperimentSource", "MixteraSearchPath", "find_configs", "search_our_configs"]

EXPERIMENT = "experiment"
_GROUPS = "?without="
_CHOSEN: ContextVar[frozenset[str] | None] = ContextVar("chosen_groups", default=None)
"""Groups chosen on the command line while Hydra builds a search path for us; None while it builds one for others."""


class ExperimentSource(FileConfigSource):
    """Read the files of `experiment/` in one folder, without the keys of some groups.

    The path is `mixtera-experiment://FOLDER?without=GROUP,GROUP`. It is a string because Hydra hands it to other
    processes.
    """

    def __init__(self, provider: str, path: str) -> None:
        """Open the folder that `path` names."""
        folder, _, names = path.partition(_GROUPS)
        super().__init__(provider, folder)
        self._ignored = names.split(",")

    @staticmethod
    def scheme() -> str:
        """Return the scheme of the paths that Hydra gives to this class."""
        return "mixtera-experiment"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one experiment."""
        result = super().load_config(config_path)
        if isinstance(result.config, DictConfig):
            for group in self._ignored:
                result.config.pop(group, None)
        return result

    def is_group(self, config_path: str) -> bool:
        """Return whether `config_path` is a folder of experiments."""
        return _is_experiment(config_path) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Return whether `config_path` is an experiment."""
        return _is_experiment(config_path) and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of experiments."""
        return super().list(config_path, results_filter) if self.is_group(config_path) else []

    def available(self) -> bool:
        """Return True: a folder without experiments is no mistake."""
        return True


class MixteraSearchPath(SearchPathPlugin):
    """Add the folders of `MIXTERA_CONF`, and the source of experiments if the command line chooses groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Extend the search path of an application of ours; leave that of other applications alone."""
        chosen = _CHOSEN.get()
        if chosen is None:
            return
        shipped, *own = conf_folders()
        for folder in own:
            search_path.append("MIXTERA_CONF", f"file://{folder}")
        # Prepended one by one, so the last folder comes first: the shipped one, as in the rest of the search path.
        for folder in reversed([shipped, *own]) if chosen else ():
            path = f"{ExperimentSource.scheme()}://{folder}{_GROUPS}{','.join(sorted(chosen))}"
            search_path.prepend("mixtera_hpc", path)


def find_configs(chosen: frozenset[str]) -> None:
    """Let every search path that Hydra builds from now on contain our sources.

    Args:
        chosen: groups for which the command line chooses a file.
    """
    Plugins.instance().register(ExperimentSource)
    Plugins.instance().register(MixteraSearchPath)
    _CHOSEN.set(chosen)


@contextlib.contextmanager
def search_our_configs(chosen: frozenset[str]) -> Iterator[None]:
    """Do what `find_configs` does, until the block ends. The caller may itself run inside a Hydra application."""
    before = _CHOSEN.get()
    application = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    find_configs(chosen)
    try:
        yield
    finally:
        _CHOSEN.set(before)
        GlobalHydra.instance().hydra = application


def _is_experiment(config_path: str) -> bool:
    return config_path.split("/")[0] == EXPERIMENT
