"""Megatron-LM's `--data-path`, and the files of `--data-args-path` and `--per-split-data-args-path`.

Megatron draws every sequence from a data set with the probability of its weight: weights count packed sequences.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mixtera_hpc.cli.migration.blend import Blend, BlendEntry, merge_entries, parse_weighted_words
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.errors import ConfigError

__all__ = ["read_megatron_blend"]


def read_megatron_blend(sources: Sequence[str]) -> Blend:
    """Read the words of `--data-path`, or the one file that contains them.

    Raises:
        ConfigError: the words are no blend, or a file is missing.
    """
    words = list(sources)
    notes: list[str] = []
    if len(words) == 1 and Path(words[0]).is_file():
        words, notes = _read_file(Path(words[0]))
    entries = [_entry(weight, prefix) for weight, prefix in parse_weighted_words(words)]
    return Blend(
        entries=merge_entries(entries),
        unit="tokens",
        counts="packed sequences",
        format="megatron",
        notes=tuple(notes),
    )


def _read_file(path: Path) -> tuple[list[str], list[str]]:
    """Return the words of a file, and notes about the rest of it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _file_error(path, f"cannot be read: {error}") from None
    if not text.lstrip().startswith(("{", "[")):
        return shlex.split(text), []
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise _file_error(path, f"is not valid JSON: {error}") from None
    others = []
    if isinstance(plain, dict):
        others = [split for split in ("valid", "test") if plain.get(split)]
        plain = plain.get("train")
    if isinstance(plain, str):
        plain = shlex.split(plain)
    if not isinstance(plain, list) or not all(isinstance(word, str | int | float) for word in plain):
        raise _file_error(path, "has no list of weights and prefixes under 'train'")
    note = (
        f"The data of {' and '.join(others)} are left out: set query.holdout.fraction, or migrate them with another "
        "--out."
    )
    return list(map(str, plain)), [note] if others else []


def _file_error(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"{path} {problem}.\n"
        "  Give the words of --data-path, a text file of them (--data-args-path), or a JSON file "
        '{"train": ["30", "PREFIX", "70", "PREFIX"]} (--per-split-data-args-path).'
    )


def _entry(weight: float | None, word: str) -> BlendEntry:
    """Return the data set of a prefix, whose `.bin` and `.idx` must exist."""
    prefix = Path(word.removesuffix(".bin")).absolute()
    for suffix in (".bin", ".idx"):
        if not prefix.with_name(prefix.name + suffix).is_file():
            raise ConfigError(
                f"{prefix}{suffix} does not exist. A prefix of Megatron's --data-path names a .bin and an .idx file.\n"
                "  Correct the prefix, or copy the file."
            )
    name = prefix.name.removesuffix("_text_document")
    return BlendEntry(name=name, root=prefix.parent, include=(f"{prefix.name}.bin",), weight=weight)
