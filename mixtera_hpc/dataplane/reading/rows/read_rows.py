"""The result of a read of rows, and an open shard."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import RangeReader, RowDecoder, ShardReader, TokenReader

__all__ = ["ReadRows", "ReadableShard"]


class ReadRows(NamedTuple):
    """Rows in the order in which they were read."""

    rows: list[Any]
    positions: NDArray[np.intp]
    """Position of each row among those requested; shape (n,)."""
    decoder: RowDecoder | None = None
    """Decodes `rows` if they are still the bytes of raw samples; else None."""


class ReadableShard(NamedTuple):
    """An open data file. The other fields are the same reader if it implements more than `ShardReader`."""

    reader: ShardReader
    range_reader: RangeReader | None
    """Set for formats whose rows have a byte range of their own."""
    token_reader: TokenReader | None
    """Set for formats whose rows are token ids."""
