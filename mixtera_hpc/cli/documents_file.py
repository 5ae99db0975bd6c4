"""Read the file of `resume --drop-documents`, which `trace --worst --write` writes."""

from pathlib import Path

import msgspec

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.read.document_filter import documents_expression

__all__ = ["read_documents"]


class _NamedDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the file."""

    shard: str
    row: int


def read_documents(path: Path) -> str:
    """Return the query that matches the documents of a file.

    Raises:
        ConfigError: the file cannot be read, names no document, or a line has another form.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--drop-documents is {str(path)!r}, which cannot be read: {error.strerror}.") from None
    documents = [(d.shard, d.row) for d in (_parse(path, i, line) for i, line in enumerate(lines, 1) if line.strip())]
    if not documents:
        raise ConfigError(
            f"--drop-documents is {str(path)!r}, which names no document.\n"
            "  Write the file with mixtera-hpc trace RUN --worst N --write FILE."
        )
    return documents_expression(documents)


def _parse(path: Path, number: int, line: bytes) -> _NamedDocument:
    try:
        document = msgspec.json.decode(line, type=_NamedDocument)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'{path} line {number} is not a document: {error}.\n  Write {{"shard": "train/a.jsonl", "row": 17}}.'
        ) from None
    if document.row < 0:
        raise ConfigError(f"{path} line {number} names row {document.row}, but rows are counted from 0.")
    return document
