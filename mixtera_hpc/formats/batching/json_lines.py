"""Batches from buffers of JSON lines: where every row ends, its values, and which rows cannot be read.

One call decodes a whole buffer of lines. Only if that fails, or if its rows do not match its lines, or if it is not
UTF-8, the buffer is decoded line by line to find the bad rows. Blank lines are not rows; their bytes belong to the row
that follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRanges, RowBatch, ScanSpec
from mixtera_hpc.formats.batching.json_payloads import decode_payload
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS, json_problem
from mixtera_hpc.formats.batching.row_paths import check_path_forms
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.batching.utf8 import is_utf8
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error

__all__ = ["JsonLineBatcher", "JsonLines", "line_ends"]

Buffer = bytes | memoryview
NEWLINE, OPEN_BRACE, CLOSE_BRACE = b"\n{}"
# RFC 8259, section 2. Python strips more bytes than these, but a JSON decoder refuses them.
JSON_WHITESPACE = b" \t\r\n"
# `{"":0`. A line of at most this many bytes may be blank; longer ones are not examined.
SHORTEST_ROW_BYTES = 5


@dataclass(frozen=True, slots=True)
class JsonLines:
    """The decoded rows of a buffer."""

    rows: list[Any]
    """Instances of the row type."""
    ends: NDArray[np.int64]
    """End of every row's line inside the buffer, newline included; shape (rows,)."""
    raw_rows: list[Any] | None = None
    """The whole rows, if a parser needs them."""
    bad: tuple[tuple[int, str], ...] = ()
    """Positions and problems of bad rows that are skipped. `rows` has a blank row for each."""

    @classmethod
    def none(cls) -> "JsonLines":
        """Return no rows."""
        return cls([], np.zeros(0, np.int64), [])


def line_ends(data: Buffer) -> NDArray[np.int64]:
    """Return the end of every line that is not blank, newline included."""
    ends = _all_line_ends(data)
    lengths = np.diff(ends, prepend=0)
    # Only short lines can be blank: look at the bytes of those alone.
    candidates = np.flatnonzero(lengths <= SHORTEST_ROW_BYTES)
    blank = [i for i in candidates if _is_blank(data, ends[i] - lengths[i], ends[i])]
    return np.delete(ends, blank) if blank else ends


def _all_line_ends(data: Buffer) -> NDArray[np.int64]:
    """Return the end of every line; the last one may lack its newline."""
    # Compare all bytes in one vector operation; `splitlines` would copy every line.
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE) + 1
    if len(data) and (not len(ends) or ends[-1] != len(data)):
        ends = np.append(ends, len(data))
    return ends


def _is_blank(data: Buffer, start: int, stop: int) -> bool:
    return not bytes(data[start:stop]).strip(JSON_WHITESPACE)


class JsonLineBatcher:
    """Decodes the buffers of one unit, and collects the rows that cannot be read."""

    def __init__(self, spec: ScanSpec, path: Path) -> None:
        self._type = RowType(spec)
        self._decoder = msgspec.json.Decoder(self._type.struct)
        self._raw_decoder = msgspec.json.Decoder() if spec.whole_rows else None
        self._documents = spec.documents
        self._blank = self._type.blank() if spec.skip_bad else None
        self._path = path
        self._bad: list[tuple[int, str]] = []
        self._rows = 0

    def decode(self, data: Buffer) -> JsonLines:
        """Decode a buffer of whole lines.

        A bad row becomes a blank row if bad rows are skipped. Otherwise it is left out and remembered for `check`.
        """
        # The fast path: one call for all lines. A parser needs the rows a second time, as dicts.
        ends = line_ends(data)
        try:
            rows = self._decoder.decode_lines(data)
            raw_rows = self._raw_decoder.decode_lines(data) if self._raw_decoder else None
        except JSON_ERRORS:
            return self._decode_line_by_line(data)
        # A row may have spanned two lines, or two rows may have stood on one: then rows and lines do not match.
        # The decoder does not look at the bytes of fields that it skips, but a run of whole rows will.
        if len(rows) != len(ends) or not _rows_are_lines(data, ends) or not is_utf8(data) or self._type.problems(rows):
            return self._decode_line_by_line(data)
        self._rows += len(rows)
        return JsonLines(rows, ends, raw_rows)

    def batch(self, lines: JsonLines, blocks: BlockRanges, lengths: NDArray[np.int64] | None) -> RowBatch:
        """Build the batch of decoded rows.

        Raises:
            ShardLayoutError: two forms of a dotted path have values.
        """
        columns = self._type.columns(lines.rows)
        path_forms = self._type.path_forms()
        check_path_forms(self._path, path_forms)
        return RowBatch(
            rows=len(lines.rows),
            blocks=blocks,
            columns=columns,
            path_forms=path_forms,
            lengths=lengths,
            documents=self._type.documents(lines.rows) if self._documents else None,
            raw_rows=lines.raw_rows,
            bad=lines.bad,
        )

    @property
    def failed(self) -> bool:
        """True after a bad row that is not skipped: the scan will raise, and only looks for more bad rows."""
        return bool(self._bad)

    @property
    def should_stop(self) -> bool:
        """True after so many bad rows that the error will not name more."""
        return len(self._bad) >= MAX_BAD_ROWS

    def check(self, rows_before: int = 0) -> None:
        """Raise the error for the bad rows of the unit, if there are any.

        Args:
            rows_before: number of rows of the shard before this unit.

        Raises:
            DataError: there are bad rows.
        """
        if self._bad:
            raise bad_rows_error(self._path, [(rows_before + row, problem) for row, problem in self._bad])

    def _decode_line_by_line(self, data: Buffer) -> JsonLines:
        rows: list[Any] = []
        ends: list[int] = []
        raw_rows: list[Any] = []
        bad: list[tuple[int, str]] = []
        for start, stop in _lines(data):
            line = bytes(data[start:stop])
            try:
                line.decode()
                row: Any = self._decoder.decode(line)
                raw = decode_payload(line) if self._raw_decoder else None
                problem = "".join(text for _, text in self._type.problems([row]))
            except JSON_ERRORS as error:
                problem = json_problem(line, error)
            if problem:
                row = self._blank
                raw = None
                if self._blank is not None:
                    bad.append((len(rows), problem))
                elif not self.should_stop:
                    self._bad.append((self._rows, problem))
            # None: a bad row that is not skipped. Its line still counts in the numbers of rows.
            if row is not None:
                rows.append(row)
                ends.append(stop)
                raw_rows.append(raw)
            self._rows += 1
        return JsonLines(rows, np.array(ends, np.int64), raw_rows if self._raw_decoder else None, tuple(bad))


def _rows_are_lines(data: Buffer, ends: NDArray[np.int64]) -> bool:
    """Return True if every line begins and ends with a brace.

    Then no row spans two lines and no line holds parts of two rows, so the n-th row is the n-th line.
    """
    if not len(ends):
        return True
    view = np.frombuffer(data, np.uint8)
    starts = np.concatenate([[0], ends[:-1]])
    # End of every line without its newline.
    stops = ends - (view[ends - 1] == NEWLINE)

    # One vector comparison settles nearly all lines; the others may have whitespace around the braces.
    unclear = np.flatnonzero((view[starts] != OPEN_BRACE) | (view[stops - 1] != CLOSE_BRACE))
    texts = (bytes(data[starts[i] : stops[i]]).strip() for i in unclear)
    return all(text.startswith(b"{") and text.endswith(b"}") for text in texts)


def _lines(data: Buffer) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of every line that is not blank."""
    start = 0
    for stop in _all_line_ends(data).tolist():
        if not _is_blank(data, start, stop):
            yield start, stop
        start = stop
