"""JSON lines in memory: where every row ends, what it says, and which rows cannot be read.

A whole buffer of lines is decoded by one call. Only when that fails, or when its rows do not fall on its lines, is the
buffer looked at line by line to name the culprits. Blank lines are no rows; their bytes count to the row that follows.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import MAX_BAD_ROWS, BlockRanges, Column, RowBatch, ScanSpec, bad_rows
from mixtera_hpc.formats.batching.row_type import RowType

__all__ = ["LineScanner", "Lines", "line_ends"]

Buffer = bytes | memoryview
NEWLINE, OPEN, CLOSE = b"\n{}"
JSON_SPACE = b" \t\r\n"
"""More is space to Python, and an error to whoever decodes the row that such a line would count to."""
SHORTEST_ROW = 5
"""`{"":0`: a shorter line may be blank, and is looked at."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The rows of a buffer."""

    rows: list[Any]
    """Instances of the row type."""
    ends: NDArray[np.int64]
    """Where the line of every row ends, newline included; shape (rows,)."""
    raw: list[Any] | None = None
    """The whole rows, where a parser wants them."""
    bad: tuple[tuple[int, str], ...] = ()
    """Rows that stand for lines that cannot be read, where those are skipped: position and problem."""

    @classmethod
    def none(cls) -> "Lines":
        """No rows."""
        return cls([], np.zeros(0, np.int64), [])


def line_ends(data: Buffer) -> NDArray[np.int64]:
    """Where every line that is not blank ends, newline included."""
    ends = _newlines(data)
    lengths = np.diff(ends, prepend=0)
    blank = [i for i in np.flatnonzero(lengths <= SHORTEST_ROW) if _is_blank(data, ends[i] - lengths[i], ends[i])]
    return np.delete(ends, blank) if blank else ends


def _newlines(data: Buffer) -> NDArray[np.int64]:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE) + 1
    if len(data) and (not len(ends) or ends[-1] != len(data)):
        ends = np.append(ends, len(data))
    return ends


def _is_blank(data: Buffer, start: int, stop: int) -> bool:
    return not bytes(data[start:stop]).strip(JSON_SPACE)


class LineScanner:
    """Decodes the buffers of one unit and remembers the rows it cannot read."""

    def __init__(self, fields: ScanSpec, path: Path) -> None:
        self._type = RowType(fields)
        self._decoder = msgspec.json.Decoder(self._type.struct)
        self._raw = msgspec.json.Decoder() if fields.rows else None
        self._documents = fields.documents
        self._blank = self._type.blank() if fields.skip_bad else None
        self._path = path
        self._bad: list[tuple[int, str]] = []
        self.rows = 0
        """Rows seen so far in this unit, readable or not."""

    def lines(self, data: Buffer) -> Lines:
        """Decode a buffer of whole lines; a row that cannot be read is blank, or missing from it and remembered."""
        ends = line_ends(data)
        try:
            rows = self._decoder.decode_lines(data)
            raw = self._raw.decode_lines(data) if self._raw else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            rows, raw = [], None
        if len(rows) != len(ends) or not _rows_are_lines(data, ends):
            return self._line_by_line(data)
        self.rows += len(rows)
        return Lines(rows, ends, raw)

    def batch(self, lines: Lines, blocks: BlockRanges, lengths: NDArray[np.int64] | None) -> RowBatch:
        """Columns and texts of decoded rows."""
        columns: dict[str, Column] = self._type.columns(lines.rows)
        documents = self._type.documents(lines.rows) if self._documents else None
        return RowBatch(
            rows=len(lines.rows),
            blocks=blocks,
            columns=columns,
            lengths=lengths,
            documents=documents,
            raw=lines.raw,
            bad=lines.bad,
        )

    @property
    def failed(self) -> bool:
        """Whether a row could not be read; nothing more of the unit is of use."""
        return bool(self._bad)

    @property
    def has_enough(self) -> bool:
        """Whether so many bad rows were found that more would not help."""
        return len(self._bad) >= MAX_BAD_ROWS

    def check(self, rows_before: int = 0) -> None:
        """Raise for the bad rows found.

        Args:
            rows_before: rows of the shard before this unit.

        Raises:
            DataError: there are any.
        """
        if self._bad:
            raise bad_rows(self._path, [(rows_before + row, problem) for row, problem in self._bad])

    def _line_by_line(self, data: Buffer) -> Lines:
        rows, ends, raw, bad = [], [], [], []
        for start, stop in _spans(data):
            try:
                rows.append(self._decoder.decode(data[start:stop]))
                ends.append(stop)
                raw.append(self._raw.decode(data[start:stop]) if self._raw else None)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                problem = f"{error}{_hint(data[start : start + 3])}"
                if self._blank is not None:
                    bad.append((len(rows), problem))
                    rows.append(self._blank)
                    ends.append(stop)
                    raw.append(None)
                elif not self.has_enough:
                    self._bad.append((self.rows, problem))
            self.rows += 1
        return Lines(rows, np.array(ends, np.int64), raw if self._raw else None, tuple(bad))


def _hint(begin: Buffer) -> str:
    """What the first bytes of a line that cannot be read may tell of the reason."""
    if bytes(begin).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "; it begins with a byte order mark: write the file as UTF-8 without one"
    return ""


def _rows_are_lines(data: Buffer, ends: NDArray[np.int64]) -> bool:
    """Whether every line begins and ends with a brace: then no row can span lines, and no line hold two halves of rows."""
    if not len(ends):
        return True
    view = np.frombuffer(data, np.uint8)
    starts = np.concatenate([[0], ends[:-1]])
    stops = ends - (view[ends - 1] == NEWLINE)
    unclear = np.flatnonzero((view[starts] != OPEN) | (view[stops - 1] != CLOSE))
    texts = (bytes(data[starts[i] : stops[i]]).strip() for i in unclear)
    return all(text.startswith(b"{") and text.endswith(b"}") for text in texts)


def _spans(data: Buffer) -> Iterator[tuple[int, int]]:
    """Start and end of every line that is not blank."""
    start = 0
    for stop in _newlines(data).tolist():
        if not _is_blank(data, start, stop):
            yield start, stop
        start = stop
