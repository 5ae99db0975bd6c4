"""Find where the rows of a JSON array lie in the file.

Normally one call of the decoder finds them without decoding any. If a row is malformed, that call fails as a whole, and
the rows are found by their brackets and commas instead: about 50 times slower, but only the malformed rows are lost.
"""

import re
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayRows", "find_array_rows"]

# Strings, so that brackets and commas in them do not count, and what separates values. A string that does not end goes
# on to the end of the file. The quantifiers give nothing back: the time is linear, and no step is stored.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_NOT_WHITESPACE = re.compile(rb"[^ \t\r\n]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRows:
    """The rows of an array."""

    starts: NDArray[np.int64]
    """First byte of every row, and the end of the last; shape (rows + 1,)."""
    stops: NDArray[np.int64]
    """End of every row, without what stands between rows; shape (rows,)."""
    problem: str = ""
    """The reason why the file is no array, or not from some row on; empty if it is one."""


def find_array_rows(data: bytes, begin: int) -> ArrayRows:
    """Return the rows of the array that is in `data` from byte `begin` on."""
    # A view: the rows are views of the same memory.
    array = memoryview(data)[begin:]
    try:
        rows = msgspec.json.decode(array, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        return _find_by_brackets(data, begin, str(error))
    starts = np.array([_address(row) for row in rows], np.int64) - (_address(data) if rows else 0)
    stops = starts + np.array([len(memoryview(row)) for row in rows], np.int64)
    return _array_rows(starts, stops, "")


def _array_rows(starts: NDArray[np.int64], stops: NDArray[np.int64], problem: str) -> ArrayRows:
    return ArrayRows(
        starts=np.append(starts, stops[-1:]) if len(starts) else np.zeros(1, np.int64), stops=stops, problem=problem
    )


def _address(buffer: Any) -> int:
    """Return the memory address of a buffer's first byte."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _find_by_brackets(data: bytes, begin: int, problem: str) -> ArrayRows:
    """Return the rows that end, given the `problem` of the array as a whole."""
    first = _NOT_WHITESPACE.search(data, begin)
    if first is None or first[0] != b"[":
        return _array_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), problem)

    bounds: list[tuple[int, int]] = []
    row_start = first.end()
    depth = 0
    for token in _TOKEN.finditer(data, first.start()):
        mark = token[0]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        # At depth 1 a comma ends a row; the bracket that leads to depth 0 ends the last one.
        if (mark == b"," and depth == 1) or depth == 0:
            bounds.append(_stripped(data, row_start, token.start()))
            row_start = token.end()
        if depth == 0:
            break
    rest = _NOT_WHITESPACE.search(data, row_start)
    if depth:
        problem = f"{problem}; row {len(bounds)}, which begins at byte {row_start}, does not end"
    elif rest is not None:
        problem = f"there is more after the end of the array, from byte {rest.start()} on"
    else:
        problem = ""
    # `[]` and `[{},]` have nothing before the last bracket.
    if not depth and bounds[-1][0] == bounds[-1][1] and len(bounds) == 1:
        bounds.pop()
    table = np.array(bounds, np.int64).reshape(-1, 2)
    return _array_rows(table[:, 0], table[:, 1], problem)


def _stripped(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """Return the range of a row without the whitespace around it."""
    first = _NOT_WHITESPACE.search(data, start, stop)
    start = first.start() if first is not None else stop
    return start, start + len(data[start:stop].rstrip(b" \t\r\n"))
