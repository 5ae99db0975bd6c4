"""Read and write YAML files: those of a run folder, and those that people write."""

import re
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import ConfigError

__all__ = ["dump_yaml", "load_yaml", "parse_yaml_text", "parse_yaml_value", "read_yaml"]

_FLOAT_OF_OMEGACONF = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
"""Numbers for OmegaConf and Hydra, and texts for `yaml.safe_load`: 1e5."""
_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a file written by `dump_yaml` (`config.yaml` of a run folder). Interpolations stay as they are.

    Raises:
        ConfigError: the file is missing, or is not valid YAML.
    """
    import yaml  # type: ignore[import-untyped]  # Imported here to keep --help fast.

    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.\n  Give the folder of a run, which has a config.yaml."
        ) from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds no keys: it is damaged.\n  Give the folder of a run, which has a config.yaml.")
    return plain


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that a person wrote, with the rules of `conf/`: 2e9 is a number, and `${…}` is resolved.

    Raises:
        ConfigError: the file is missing, is not valid YAML, or has no keys.
    """
    import yaml  # Imported here, like OmegaConf, to keep --help fast.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.\n  Give a YAML file of `key: value` lines.") from None
    if not isinstance(plain, dict) or not plain:
        raise ConfigError(f"{path} has no keys.\n  Give a YAML file of `key: value` lines.")
    return {str(key): value for key, value in plain.items()}


def parse_yaml_value(word: str, text: str) -> Any:
    """Return a value that a person wrote, with the rules of `conf/`: 1e-3 is a number.

    Args:
        word: what the value is part of, for messages.
        text: the value, as YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    import yaml  # Imported here, like OmegaConf, to keep --help fast.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, KeyError) as error:
        raise ConfigError(f"{word!r} has no valid value: {str(error).splitlines()[0]}. Put it in quotes.") from None


def parse_yaml_text(word: str, text: str) -> Any:
    """Return a text or a list of texts that a person wrote as YAML: 007, 1e5 and true stay as typed, null is None.

    Args:
        word: what the value is part of, for messages.
        text: the value, as YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    import yaml  # Imported here to keep --help fast.

    try:
        value = yaml.load(f"value: {text}", yaml.BaseLoader)["value"]  # noqa: S506 - makes nothing but texts.
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{word!r} has no valid value: {str(error).splitlines()[0]}. Put it in quotes.") from None
    return None if text.strip() == "null" else value


def dump_yaml(plain: dict[str, Any]) -> str:
    """Return the text that `load_yaml` and `read_yaml` read back. A `${…}` in it belongs to the shell and stays."""
    import yaml  # Imported here to keep --help fast.

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Quotes every text that a reader takes for something else."""

        def represent_text(self, text: str) -> Any:
            # A line break of Unicode would be read back as a space.
            style = '"' if _UNICODE_LINE_BREAK.search(text) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_text)
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT_OF_OMEGACONF, list("-+0123456789"))
    return str(yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))
