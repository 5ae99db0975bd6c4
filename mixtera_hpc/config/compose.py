"""Compose a configuration with Hydra: overrides in, one frozen `Config` out. Price: 0.1 s of CPU time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.composition.conf_folders import CONFIG_NAME, check_file_names, conf_dir
from mixtera_hpc.config.composition.messages import explain
from mixtera_hpc.config.composition.override_words import chosen_groups, first_of_sweep, hydra_words
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.job_shape import signal_lead_s
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import load_yaml
from mixtera_hpc.errors import ConfigError

__all__ = ["compose", "compose_plain", "from_omegaconf", "load_config", "prepare_application"]

_SWEEP_FLAGS = frozenset({"-m", "--multirun"})
_CONFIG_FLAGS = frozenset({"-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name"})
"""Flags of Hydra that replace or add config files; only Hydra itself can compose then."""
_OTHER_MODES = frozenset({"-r", "--run", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion"})
"""Flags of Hydra that exclude a sweep."""


def compose(overrides: Sequence[str]) -> Config:
    """Compose the primary config with Hydra `overrides` and check it.

    Raises:
        ConfigError: an override that does not parse, an unknown group, key or value, or any failed check.
    """
    config = from_plain(Config, compose_plain(overrides))
    check_run(config)
    return config


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose to nested dicts, resolved but not converted; see `compose`."""
    return from_omegaconf(_composed(overrides))


def load_config(path: Path) -> Config:
    """Return the configuration that a run was made with.

    Raises:
        ConfigError: the file was written by another version, or by hand; every problem is named.
    """
    return from_plain(Config, load_yaml(path))


def from_omegaconf(node: Any) -> dict[str, Any]:
    """Resolve a DictConfig into plain dicts, lists and scalars. `???` stays; `from_plain` names missing keys.

    Raises:
        ConfigError: an interpolation that cannot be resolved.
    """
    from omegaconf import OmegaConf  # Imported here to keep --help fast.
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    return {str(key): value for key, value in plain.items() if key != "hydra"} if isinstance(plain, dict) else {}


def prepare_application(arguments: Sequence[str]) -> list[str]:
    """Prepare this process for `hydra.main` and return the command line for it, given that of the user.

    Afterwards Hydra finds the schema and the configs of the user, and text values are quoted. Mistakes are reported
    here, as by every verb: Hydra's own messages name no near misses.

    Raises:
        ConfigError: what the command line asks for cannot be composed.
    """
    # Imported here because they import Hydra, which is slow.
    from mixtera_hpc.config.composition.experiments import find_configs
    from mixtera_hpc.config.composition.schema_store import register_schema

    words = [word for word in arguments if word.startswith("~") or ("=" in word and not word.startswith("-"))]
    flags = [argument for argument in arguments if argument not in words]
    sweep = not _SWEEP_FLAGS.isdisjoint(flags)
    if sweep and (excluded := sorted(_OTHER_MODES.intersection(flag.partition("=")[0] for flag in flags))):
        raise ConfigError(
            f"A sweep (-m) cannot be combined with {excluded[0]}. Remove one of them: {excluded[0]} without -m takes "
            "one value for each key."
        )
    if sweep:
        _check_one_job_shape(words)
    if _CONFIG_FLAGS.isdisjoint(flag.partition("=")[0] for flag in flags):
        config = from_plain(Config, compose_plain(first_of_sweep(words) if sweep else words))
        words += _launcher_words(words, config)

    register_schema()
    find_configs(chosen_groups(words))
    # Hydra's argument parser needs all overrides in one list.
    return [*flags, *hydra_words(words, sweep=sweep)]


def _launcher_words(words: Sequence[str], config: Config) -> list[str]:
    """Return overrides of Hydra's launcher for Slurm that need the composed configuration and were not typed.

    Raises:
        ConfigError: the launcher would ignore the environment.
    """
    if not _uses_slurm_launcher(words):
        return []
    if config.environment.kind != "none":
        raise ConfigError(
            f"hydra/launcher=submitit_slurm starts the interpreter that submits, but environment.kind is "
            f"{config.environment.kind}.\n  Use mixtera-hpc submit or mixtera-hpc sweep."
        )
    key = "hydra.launcher.signal_delay_s"
    if any(word.lstrip("+").partition("=")[0] == key for word in words):
        return []
    return [f"{key}={signal_lead_s(config.job, config.cluster)}"]


def _uses_slurm_launcher(words: Sequence[str]) -> bool:
    return any(word.partition("=")[::2] == ("hydra/launcher", "submitit_slurm") for word in words)


def _check_one_job_shape(words: Sequence[str]) -> None:
    """Refuse Hydra's launcher for Slurm with values of `job` or `cluster` that differ between points.

    The launcher submits one job array, whose tasks have the resources of the first point.
    """
    if not _uses_slurm_launcher(words):
        return
    first = first_of_sweep(words)
    swept = [word.partition("=")[0] for word, one in zip(words, first, strict=True) if word != one]
    if keys := [key for key in swept if key.lstrip("+").partition(".")[0] in ("job", "cluster")]:
        raise ConfigError(
            f"hydra/launcher=submitit_slurm submits one job array, whose tasks all have the same resources, but "
            f"{keys[0]} has several values.\n  Use mixtera-hpc sweep, which submits a job for every point."
        )


def _composed(overrides: Sequence[str]) -> Any:
    """Compose `overrides` to a DictConfig, interpolations unresolved."""
    import yaml  # type: ignore[import-untyped]  # Imported here, like Hydra, to keep --help fast.
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # These import Hydra too.
    from mixtera_hpc.config.composition.experiments import search_our_configs
    from mixtera_hpc.config.composition.schema_store import register_schema

    register_schema()
    words = hydra_words(overrides)
    with search_our_configs(chosen_groups(words)):
        try:
            check_file_names()
            with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="mixtera-hpc"):
                composed = hydra_compose(CONFIG_NAME, overrides=words)
        except yaml.YAMLError as error:
            raise ConfigError(f"Invalid YAML in a config file: {error}\n  Fix the file.") from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(explain(error, overrides)) from None
        except OSError as error:  # Not before HydraException, some of which are an OSError too.
            raise ConfigError(
                f"A config file cannot be read: {error}.\n  Make it readable, or correct MIXTERA_CONF."
            ) from None
        except RecursionError:
            raise ConfigError(
                "The `defaults` lists of the config files form a cycle: a file lists itself, or one that lists it.\n"
                "  Remove one of the entries."
            ) from None
    if "experiment" in composed:
        raise ConfigError(
            "The keys of the experiment are below `experiment`. Begin its file with the line `# @package _global_`, "
            "which puts them at the top. No byte order mark may be before it."
        )
    return composed
