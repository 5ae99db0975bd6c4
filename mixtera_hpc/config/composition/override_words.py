"""Turn overrides as users type them into overrides in Hydra's grammar.

Hydra parses every value with its own grammar, in which `query.where=q >= 0.5` is an error and `job.name=7` a
number. The schema knows better: the value of a key that takes text is quoted here, so that it arrives as it was typed,
and so are the entries of a list of texts that Hydra would read as numbers or not at all
(`job.command=[train,--steps,100,--name=ü]`).
"""

import re
from collections.abc import Iterable

from mixtera_hpc.config.key_paths import groups, has_short_form, hint_of, takes_text, takes_texts
from mixtera_hpc.errors import ConfigError

__all__ = ["chosen_groups", "first_of_sweep", "hydra_words", "is_text_key", "quote_entries", "sweep_values"]

_IN_QUOTES = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)
_PLAIN_WORD = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_/][\w./-]*", re.IGNORECASE | re.ASCII)
"""Text that Hydra reads as the same text."""
_LIST_ENTRY = re.compile(
    r"""(?P<kept>(['"])(?:\\.|(?!\2).)*\2|\$\{[^}]*\})"""
    r"""|(?<=[\[,])(?P<space>\s*)(?P<text>[+-]?(?:\.?\d[\w.+-]*|inf|nan)|true|false"""
    r"""|[^,\[\]{}()"'$\\]*?[^\w\s/+.%*@?|:,\[\]{}()"'$\\-][^,\[\]{}()"'$\\]*?)(?=\s*[,\]])""",
    re.DOTALL | re.IGNORECASE | re.ASCII,
)
"""Quoted text or an interpolation (`kept`), or an entry that needs quotes (`text`): one that Hydra reads as a number or
a truth value, or one with a character that Hydra does not read without quotes, such as ü, =, ; or #."""
_HOME = re.compile(r"~[\w-]*(/|$)")


def hydra_words(words: Iterable[str], *, sweep: bool = False) -> list[str]:
    """Return `words` with text values in quotes, where Hydra would read them as something else.

    Args:
        words: overrides, `key=value` each. Flags (`--cfg`) and keys outside the schema are left as they are.
        sweep: whether commas separate values (`hydra --multirun`). Each value is quoted then.

    Raises:
        ConfigError: a value begins with `~`, which neither the shell nor Hydra expands.
    """
    return [_hydra_word(word, sweep) for word in words]


def chosen_groups(words: Iterable[str]) -> frozenset[str]:
    """Return the groups for which `words` choose a config file, as `mixture=unimax` does."""
    known = set(groups())
    return frozenset(key for key in (word.partition("=")[0].lstrip("+") for word in words) if key in known)


def is_text_key(key: str) -> bool:
    """Return whether the key of an override takes text."""
    return takes_text(hint_of(key.lstrip("+")))


def first_of_sweep(words: Iterable[str]) -> list[str]:
    """Return `words` with the first value of every override that lists several, for checks before a sweep starts."""
    return [f"{word.partition('=')[0]}={values[0]}" if (values := sweep_values(word)) else word for word in words]


def sweep_values(word: str) -> list[str]:
    """Return the values of an override that lists several (`a,b`, `choice(…)`, `range(…)`), or an empty list.

    Values of a key that takes text are returned as typed, without the escapes that Hydra needs.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser  # Slow to import.
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(quote_entries(word))
    except HydraException:
        return []
    if not parsed.is_discrete_sweep() or "glob(" in word:
        return []
    texts = list(parsed.sweep_string_iterator())
    if not is_text_key(word.partition("=")[0]):
        return texts
    pairs = zip(parsed.sweep_iterator(), texts, strict=True)
    return [value if type(value) is str else text for value, text in pairs]


def quote_entries(word: str) -> str:
    """Return an override with quotes around the entries of a list of texts that need them; others as they are."""
    key, _, value = word.partition("=")
    return f"{key}={_LIST_ENTRY.sub(_quoted_entry, value)}" if takes_texts(hint_of(key.lstrip("+"))) else word


def _quoted(text: str) -> str:
    """Return `text` as a quoted value of Hydra's grammar. A backslash is special only before a quote or at the end."""
    escaped = re.sub(r'(\\*)"', r"\1\1\\" + '"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def _hydra_word(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    if not is_text_key(key):
        return quote_entries(word)
    values = sweep_values(word) if sweep else []
    return f"{key}={','.join(_hydra_value(key, part) for part in values or [value])}"


def _quoted_entry(match: re.Match[str]) -> str:
    return match["kept"] or f'{match["space"]}"{match["text"]}"'


def _hydra_value(key: str, value: str) -> str:
    if _HOME.match(value):
        raise ConfigError(f"'{key}={value}': the shell leaves ~ as it is behind a =. Write {key}=$HOME{value[1:]}")
    # These have a special meaning: nothing, null, an interpolation, quotes, a mapping (if the key has a short
    # form).
    if value in ("", "null") or value.startswith("${") or _IN_QUOTES.fullmatch(value):
        return value
    if value.startswith("{") and has_short_form(hint_of(key.lstrip("+"))):
        return value
    return value if _PLAIN_WORD.fullmatch(value) else _quoted(value)
