"""The result of a read of rows, and an open shard."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import RangeReader, RowDecoder, ShardReader, TokenReader

__all__ = ["EncodedRows", "ReadRows", "ReadableShard", "Row"]

Row = bytes | memoryview


class EncodedRows(NamedTuple):
    """Raw samples that are not decoded yet: parts of mapped memory, or bytes that were read."""

    decoder: RowDecoder
    memory: memoryview
    """The memory of all mapped files."""
    own: list[bytes]
    """Rows outside of this memory."""
    first: NDArray[np.int64]
    """First byte of each row in `memory`, or its position in `own`; shape (n,)."""
    stop: NDArray[np.int64]
    """One past the last byte of each row in `memory`; 0 for those in `own`."""
    shards: NDArray[np.int32]
    """The shards of rows in `memory`, which may change until the rows are decoded; each once."""


class ReadRows(NamedTuple):
    """Rows in the order in which they were read."""

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
