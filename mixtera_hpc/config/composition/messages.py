"""Turn errors of Hydra and OmegaConf into messages that say what the user has to do."""

import dataclasses
import re
from collections.abc import Sequence

from mixtera_hpc.config.composition.conf_folders import conf_folders, group_options, own_files
from mixtera_hpc.config.composition.override_words import hydra_words
from mixtera_hpc.config.convert import missing_key, unknown_key
from mixtera_hpc.config.key_paths import hint_of, schema_keys, takes_texts, without_none
from mixtera_hpc.errors import did_you_mean

__all__ = ["explain"]


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """Return the message for an error of Hydra's or OmegaConf's to which `overrides`, as typed, led."""
    text = str(error).strip()
    special = _wrong_option(text, overrides) or _wrong_file(error, text) or _unknown_inner_key(error, text)
    special = special or _mapping_for_list(error)
    if special is not None:
        return special
    for pattern, message in _MESSAGES:
        if match := re.search(pattern, text):
            return message(match, text)
    return _unparsable(overrides) or text + (f"\n  The overrides were: {' '.join(overrides)}" if overrides else "")


def _wrong_option(text: str, overrides: Sequence[str]) -> str | None:
    """Return the message for an override that gives a group a value that cannot name a config file."""
    if "Config group override must be a string or a list" not in text:
        return None
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        options = group_options(key) if key in _group_names() else []
        if options and value not in options:
            return (
                f"{word}: {key} is a group of keys, and {value} does not name one of its config files.\n"
                f"  Choose {' or '.join(f'{key}={option}' for option in options)}, or set a single key: {key}.KEY=VALUE"
            )
    return None


def _wrong_file(error: Exception, text: str) -> str | None:
    """Return the message for a config file of the user that holds no mapping, or no text; None for other errors."""
    import yaml  # type: ignore[import-untyped]  # Imported here to keep --help fast.

    if not isinstance(error, UnicodeDecodeError) and "ListConfig" not in text:
        return None
    for folder, name in own_files():
        path = folder / name
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as problem:
            return f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}.\n  Save it as UTF-8."
        except (OSError, yaml.YAMLError):
            continue  # Another file than the one that failed: its error would be of this kind.
        if isinstance(content, list):
            return f"{path} holds a list.\n  Write `key: value` lines."
    return None


def _mapping_for_list(error: Exception) -> str | None:
    """Return the message for keys and values in place of a list; None for other errors."""
    texts = (str(error), str(error.__cause__))
    for text in texts:
        if "Cannot merge DictConfig with ListConfig" in text and (key := _full_key(text)) is not None:
            return f"{key} has keys and values, expected a list.\n  Write {key}=[…], with brackets around its entries."
    return None


def _unknown_inner_key(error: Exception, text: str) -> str | None:
    """Return the message for an override of several keys at once, `group={key: value}`, one of which is unknown."""
    match = re.search(r"Could not override '([^']+)'", text)
    key = getattr(error.__cause__, "full_key", None)
    return _cannot_be_set(key) if match and key and key.startswith(f"{match.group(1)}.") else None


def _group_names() -> list[str]:
    return [key.path for key in schema_keys() if key.is_group and "." not in key.path]


def _near_keys(key: str) -> str:
    """Return a hint that names keys similar to `key`, or equal to it but for the group."""
    known = [schema_key.path for schema_key in schema_keys() if not schema_key.is_group]
    leaf = key.rpartition(".")[2]
    same = [repr(path) for path in known if path.rpartition(".")[2] == leaf]
    return f" Did you mean {' or '.join(same)}?" if same else did_you_mean(key, known)


def _environment(match: "re.Match[str]", text: str) -> str:
    name = match.group(1)
    key = _full_key(text)
    needs = f"{key} needs" if key else "The configuration needs"
    return (
        f"{needs} the environment variable {name}, which is not set.\n  Set {name}, or give {key or 'the key'}=<value>."
    )


def _dangling(match: "re.Match[str]", text: str) -> str:
    key = _full_key(text)
    target = match.group(1)
    refers = f"{key} refers to it" if key else "a value refers to it"
    return f"{target} is not a known key, but {refers}.{_near_keys(target)}"


def _refers_to_missing(match: "re.Match[str]", text: str) -> str:
    key = _full_key(text)
    target = match.group(1)
    return missing_key(target) + (f"\n  The value of {key} is taken from it." if key else "")


def _missing(match: "re.Match[str]", text: str) -> str:
    return missing_key(match.group(1))


def _unknown_key(match: "re.Match[str]", text: str) -> str:
    key = match.group(1)
    if "/" in key or "@" in key:
        return (
            f"{key} is not a group of config files. The groups are {', '.join(_group_names())} and experiment.\n"
            f"  To set a key, write its path with dots, e.g. {key.replace('/', '.').partition('@')[0]}.KEY=VALUE"
        )
    return _cannot_be_set(key)


def _no_such_file(match: "re.Match[str]", text: str) -> str:
    group, _, option = match.group(1).rpartition("/")
    for folder in conf_folders():
        path = folder / group / f"{option}.yaml"
        if path.is_dir():
            return f"{path} is a folder, but must be a config file.\n  Rename it, and put a YAML file there."
        if path.is_symlink():
            return f"{path} is a link to {path.readlink()}, which does not exist.\n  Correct the link."
        if path.with_suffix(".yml").is_file():
            return f"{path.with_suffix('.yml')} is not read: config files end in .yaml.\n  Rename it to {path.name}."
    return f"{group}={option} does not exist.{did_you_mean(option, group_options(group))}"


_MESSAGES = (
    (r"Environment variable '(\w+)' not found", _environment),
    (r"Interpolation key '([\w.]+)' not found", _dangling),
    (r"MissingMandatoryValue while resolving interpolation: Missing mandatory value: (\S+)", _refers_to_missing),
    (r"Missing mandatory value: (\S+)", _missing),
    (r"is not in struct\s+full_key: (\S+)", _unknown_key),
    (r"Could not override '([^']+)'", _unknown_key),
    (r"Could not (?:find|load) '([^']+)'", _no_such_file),
)


def _cannot_be_set(key: str) -> str:
    """Return the message for a key that cannot be set."""
    for known in schema_keys():
        is_optional = dataclasses.is_dataclass(without_none(known.hint)) and not known.is_group
        if is_optional and key.startswith(f"{known.path}.") and hint_of(key) is not None:
            return f"{known.path} is null, so {key} cannot be set alone.\n  Set it as a whole: {known.path}='{{…}}'"
    parent = key.rpartition(".")[0]
    if parent and hint_of(key) is not None:
        return (
            f"{key} cannot be set, because a config file or an override gives {parent} a value without keys.\n"
            f"  Write {parent} as a mapping of `key: value` lines."
        )
    return unknown_key(key, _near_keys(key))


def _full_key(text: str) -> str | None:
    match = re.search(r"full_key: (\S+)", text)
    return match.group(1) if match else None


def _unparsable(overrides: Sequence[str]) -> str | None:
    """Return the message for the first override that is not in Hydra's grammar; None if all are."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # Slow to import.
    from hydra.errors import HydraException

    for override, word in zip(overrides, hydra_words(overrides), strict=True):
        key, _, value = override.partition("=")
        try:
            OverridesParser.create().parse_override(word)
            parses = bool(key)
        except HydraException:
            parses = False
        if parses:
            continue
        if not key or not value:
            return f"{override!r} is not an override. Write key=value, e.g. dataplane.seed=3."
        name = key.lstrip("+~")
        if hint_of(name) is not None and not re.fullmatch(r"[\w./@-]+", name, re.ASCII):
            return (
                f"{override!r} cannot be set here: Hydra takes ASCII letters, digits and ./@_- in a key, but this one "
                f"is {name!r}. Write it in an experiment file."
            )
        if "." in name and hint_of(name) is None:
            return _cannot_be_set(name)
        if takes_texts(hint_of(name)):
            return f'{override!r} is not a Hydra override. Put each text in double quotes: \'{key}=["a, b", "c"]\''
        if value.startswith(("[", "{")):
            return (
                f"{override!r} is not a Hydra override.\n"
                "  Put each text in it that has special characters in double quotes, and names of keys in none: "
                "'mixture.domains=[{key: {source: \"a b, c\"}, weight: 1}]'. Or write it in an experiment file."
            )
        return f"{override!r} is not a Hydra override. Put its value in extra quotes: '{key}=\"{value}\"'"
    return None
