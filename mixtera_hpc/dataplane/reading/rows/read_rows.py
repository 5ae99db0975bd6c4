"""The result of a read of rows, and an open shard."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import RangeReader, ShardReader, TokenReader

__all__ = ["DecodeRows", "EncodedRows", "ReadRows", "ReadableShard"]

DecodeRows = Callable[[Sequence[Any]], Sequence[Any]]
"""Converts rows as they are in memory to samples or texts. Raises ValueError, or one of `JSON_ERRORS`."""

DECODED_AT_ONCE = 64
"""Rows that one call decodes. It holds the interpreter's lock, for about 0.1 ms."""
NO_SHARDS = np.zeros(0, np.int32)


class EncodedRows(NamedTuple):
    """Raw samples that are not decoded yet: parts of mapped memory, or bytes that were read or packed."""

    decode: DecodeRows
    memory: memoryview
    """The memory of all mapped files."""
    own: list[Any]
    """Rows outside of this memory."""
    first: NDArray[np.int64]
    """First byte of each row in `memory`, or its position in `own`; shape (n,)."""
    stop: NDArray[np.int64]
    """One past the last byte of each row in `memory`; 0 for those in `own`."""
    shards: NDArray[np.int32]
    """The shards of rows in `memory`, which may change until the rows are decoded; each once."""

    def groups(self) -> Iterator[list[Any]]:
        """Yield all rows; see `groups_of`."""
        return self.groups_of(self.first.tolist(), self.stop.tolist())

    def groups_of(self, first: list[int], stop: list[int]) -> Iterator[list[Any]]:
        """Yield the rows with these places, in groups that are decoded together."""
        memory = self.memory
        own = self.own
        for begin in range(0, len(first), DECODED_AT_ONCE):
            group = slice(begin, begin + DECODED_AT_ONCE)
            yield [memory[a:b] if b else own[a] for a, b in zip(first[group], stop[group], strict=True)]

    @classmethod
    def of(cls, decode: DecodeRows, rows: list[Any]) -> "EncodedRows":
        """Return rows of which none is in mapped memory."""
        return cls(decode, memoryview(b""), rows, np.arange(len(rows)), np.zeros(len(rows), np.int64), NO_SHARDS)


class ReadRows(NamedTuple):
    """Rows in the order in which they were read, all of them decoded or none."""

    rows: list[Any]
    """The rows; empty if they are not decoded yet."""
    positions: NDArray[np.intp]
    """Position of each row among those requested; shape (n,)."""
    encoded: EncodedRows | None = None
    """Raw samples that are not decoded yet."""


class ReadableShard(NamedTuple):
    """An open data file. The other fields are the same reader if it implements more than `ShardReader`."""

    reader: ShardReader
    range_reader: RangeReader | None
    """Set for formats whose rows have a byte range of their own."""
    token_reader: TokenReader | None
    """Set for formats whose rows are token ids."""
