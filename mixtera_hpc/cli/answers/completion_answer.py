"""Return the words that complete a command line: verbs, actions, options, keys, values of keys, and runs."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Literal, get_args, get_origin

from mixtera_hpc.cli.main import VERBS, verb_parser
from mixtera_hpc.config.composition.conf_folders import group_options
from mixtera_hpc.config.key_paths import SchemaKey, schema_keys, without_none
from mixtera_hpc.config.run_folder import find_runs, runs_root
from mixtera_hpc.errors import MixteraError

__all__ = ["completions"]

_TAKES_RUNS = ("RUN", "run_name", "runs")
_TAKES_KEYS = ("overrides", "filters")


def completions(line: str) -> list[str]:
    """Return what the last word of `line` can become; a `line` that ends in a space begins a new word.

    Words that end in `=` or `.` are to be continued.
    """
    words = line.split()[1:]
    if line[-1:].isspace() or not words:
        words.append("")
    *before, word = words
    if not before:
        return _beginning_with(word, [*VERBS, "--help", "--version"])
    if before[0] not in VERBS:
        return []
    parser, _ = verb_parser(before[0])
    parser = _subparser(parser, before[1:])
    return _beginning_with(word, _words(parser, before, word))


def _subparser(parser: argparse.ArgumentParser, words: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of the action that `words` name, for verbs with actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return next((action.choices[word] for word in words if word in action.choices), parser)
    return parser


def _words(parser: argparse.ArgumentParser, before: list[str], word: str) -> Iterator[str]:
    actions = parser._actions
    option = next((action for action in actions if before[-1] in action.option_strings), None)
    if option is not None and option.nargs != 0:
        yield from map(str, option.choices or ())
        return
    if word.startswith("-"):
        yield from (name for action in actions for name in action.option_strings if action.help != argparse.SUPPRESS)
        return
    positional = [action for action in actions if not action.option_strings]
    for action in positional:
        yield from map(str, action.choices or ())
    names = {part for action in positional for part in (action.dest, *str(action.metavar or "").split(" | "))}
    if not names.isdisjoint(_TAKES_RUNS) and "=" not in word:
        yield from _runs()
    if not names.isdisjoint(_TAKES_KEYS):
        yield from _key_words(word)


def _runs() -> Iterator[str]:
    runs = find_runs(runs_root())
    yield from sorted({run.name for run in runs})
    yield from (run.run_id for run in runs)


def _key_words(word: str) -> Iterator[str]:
    """Yield overrides that begin like `word`, one dotted part or one value at a time."""
    path, has_value, _ = word.partition("=")
    keys = list(schema_keys())
    if has_value:
        yield from (f"{path}={value}" for value in _values(path, keys))
        return
    yield "experiment="
    for key in keys:
        above, _, _ = key.path.rpartition(".")
        if path.rpartition(".")[0] != above:
            continue
        if key.is_group:
            yield f"{key.path}."
        if not key.is_group or _options(key.path):
            yield f"{key.path}="


def _values(path: str, keys: Iterable[SchemaKey]) -> list[str]:
    if options := _options(path):
        return options
    hint = without_none(next((key.hint for key in keys if key.path == path), None))
    if hint is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(hint)] if get_origin(hint) is Literal else []


def _options(group: str) -> list[str]:
    if "." in group:
        return []
    try:
        return group_options(group)
    except MixteraError:
        return []  # MIXTERA_CONF is wrong; every other verb says so.


def _beginning_with(word: str, candidates: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(candidate for candidate in candidates if candidate.startswith(word)))
