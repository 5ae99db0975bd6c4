"""Documents that are made of whole rows: a template of several fields, a function of yours, or a conversation.

`data.text` is a template if it has braces (`"{title}: {body}"`), a function if it begins with `function:`
(`function:my_pkg.texts`, from a list of rows to a list of texts), and a conversation if it begins with `chat:`
(`chat:messages`, see `chat_rows`). Anything else is the path of one field, which formats read by themselves. Price:
rows are decoded as a whole.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import as_text
from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, DataError
from mixtera_hpc.formats.base import BlockRef, Format, RangeReader, ShardReader
from mixtera_hpc.formats.batching.row_paths import path_forms
from mixtera_hpc.formats.chat_rows import chat_documents, chat_path, is_chat, value_at
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.user_functions import import_function, source_digest
from mixtera_hpc.tokens.chat_template import ChatTemplate

__all__ = ["FUNCTION_PREFIX", "ComposedText", "is_composed", "open_reader"]

FUNCTION_PREFIX = "function:"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ComposedText:
    """The way from a row to its document."""

    make: Callable[[Rows], tuple[list[str], list[tuple[int, str]]]]
    """Return the document of each row, and (position, problem) of rows that have none, ascending."""
    digest: str
    """Hex digest of the file that defines the function, or of the chat template; else the template itself."""
    paths: tuple[str, ...] = ()
    """The dotted paths of a template, or of conversations."""

    @classmethod
    def of(cls, text: str, chat: ChatTemplate | None = None) -> "ComposedText":
        """Read a template, or import a function; `chat` is the template of conversations.

        Raises:
            ConfigError: the template is malformed, or the function cannot be imported.
        """
        if is_chat(text):
            path = chat_path(text)
            own = (path,) if "." in path else ()
            return cls(lambda rows: chat_documents(path, chat, rows), chat.digest if chat else "", own)
        if text.startswith(FUNCTION_PREFIX):
            name = text.removeprefix(FUNCTION_PREFIX)
            function = import_function(name, "data.text")
            return cls(lambda rows: _texts_of_function(name, function, rows), source_digest(function))
        parts = _template_parts(text)
        paths = tuple(dict.fromkeys(field for _, field in parts if field is not None and "." in field))
        return cls(lambda rows: _texts_of_template(parts, rows), text, paths)

    def path_forms(self, rows: Rows) -> dict[str, set[int]]:
        """Return the forms of every dotted path that have values in these rows: positions in `row_paths.path_forms`."""
        return {path: {number for row in rows for number in _forms_with_values(row, path)} for path in self.paths}


def is_composed(text: str | None) -> bool:
    """Return whether `data.text` is a template, a function or a conversation instead of the path of one field."""
    return text is not None and (text.startswith(FUNCTION_PREFIX) or is_chat(text) or "{" in text or "}" in text)


def open_reader(
    file_format: Format, path: Path, text: str | None, cache: BlockCache, chat: ChatTemplate | None = None
) -> ShardReader:
    """Open a shard for random access, with documents that may be composed; see `Format.open`.

    Raises:
        ConfigError: the function of `text` cannot be imported.
        DataError: the shard cannot be opened.
    """
    if text is None or not is_composed(text) or file_format.holds_tokens:
        return file_format.open(path, text, cache)
    composed = ComposedText.of(text, chat)
    reader = file_format.open(path, None, cache)
    if isinstance(reader, RangeReader):
        return _ComposedRangeReader(reader, composed, path)
    return _ComposedReader(reader, composed, path)


class _ComposedReader:
    """A `ShardReader` whose documents are made of whole rows."""

    def __init__(self, reader: ShardReader, composed: ComposedText, path: Path) -> None:
        self._reader = reader
        self._composed = composed
        self._path = path

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named rows of a block."""
        return self._texts(self._reader.payloads(block, lengths, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the whole rows as dicts."""
        return self._reader.payloads(block, lengths, rows)

    def close(self) -> None:
        """Release the file descriptor."""
        self._reader.close()

    def _texts(self, rows: Rows) -> list[str]:
        texts, problems = self._composed.make(rows)
        if problems:
            raise DataError(
                f"{self._path} has changed since it was indexed, or the function or chat template of data.text has: "
                f"{problems[0][1]}.\n"
                "  Run mixtera-hpc index verify, then mixtera-hpc index build."
            )
        return texts


class _ComposedRangeReader(_ComposedReader):
    """The same for formats whose rows have byte ranges."""

    def __init__(self, reader: Any, composed: ComposedText, path: Path) -> None:
        super().__init__(reader, composed, path)
        self._ranges: RangeReader = reader

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """Return the texts of the rows at these byte ranges."""
        return self._texts(self._ranges.payloads_at(starts, lengths))

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the whole rows as dicts."""
        return self._ranges.payloads_at(starts, lengths)


def _template_parts(text: str) -> list[tuple[str, str | None]]:
    """Return (literal, path of the field that follows it or None) of every part of a template.

    Raises:
        ConfigError: the braces do not match, or a field has no name.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"data.text is {text!r}, which is no template: {error}. Write {{{{ for a brace.") from None
    for _, field, spec, conversion in parsed:
        if field is not None and (not all(field.split(".")) or spec or conversion):
            raise ConfigError(
                f"data.text is {text!r}; expected fields such as {{title}} or {{meta.title}} in braces, without "
                "formats. Write {{ for a brace."
            )
    return [(literal, field) for literal, field, _, _ in parsed]


def _texts_of_template(parts: Sequence[tuple[str, str | None]], rows: Rows) -> tuple[list[str], list[tuple[int, str]]]:
    texts = []
    problems = []
    for number, row in enumerate(rows):
        try:
            texts.append("".join(literal + ("" if field is None else _field(row, field)) for literal, field in parts))
        except ValueError as error:
            texts.append("")
            problems.append((number, str(error)))
    return texts, problems


def _value_at(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the value below a chain of keys; None if there is none."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _forms_with_values(row: Mapping[str, Any], path: str) -> Iterator[int]:
    return (number for number, keys in enumerate(path_forms(path)) if _value_at(row, keys) is not None)


def _field(row: Mapping[str, Any], path: str) -> str:
    """Return the text at a dotted path, which `row_paths` defines.

    Raises:
        ValueError: there is no text.
    """
    value = value_at(row, path)
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str | int | float):
        raise ValueError(f"{path!r} of data.text is {'null' if value is None else type(value).__name__}")
    return as_text(value)


def _texts_of_function(
    name: str, function: Callable[[Any], Any], rows: Rows
) -> tuple[list[str], list[tuple[int, str]]]:
    try:
        # A copy: the function may sort or change its list.
        values = list(function(list(rows)))
    except USER_CODE_ERRORS as error:
        raise DataError(f"{name}, the function of data.text, failed: {type(error).__name__}: {error}.") from error
    # A shifted list would give every row the text of another.
    if len(values) != len(rows):
        raise DataError(f"{name}, the function of data.text, returned {len(values)} texts for {len(rows)} rows.")
    texts: list[str] = []
    problems: list[tuple[int, str]] = []
    for number, value in enumerate(values):
        problem = _problem_of(value)
        texts.append(value if problem is None else "")
        if problem is not None:
            problems.append((number, f"{name} returned {problem}"))
    return texts, problems


def _problem_of(value: Any) -> str | None:
    """Return the reason why a function's result is no text; None if it is one."""
    if not isinstance(value, str):
        return f"{type(value).__name__} instead of text"
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate {value[error.start]!a}, half of a character"
    return None
