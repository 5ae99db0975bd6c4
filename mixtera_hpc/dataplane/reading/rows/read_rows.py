"""What a read of rows returns, and the shards that are open for reads."""

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
    """Set if `rows` are still the bytes of raw samples, which this decodes."""


class ReadableShard(NamedTuple):
    """An open data file. The fields after the first are the same reader, where it can do more."""

    reader: ShardReader
    range_reader: RangeReader | None
    """Set for formats whose rows have a byte range of their own."""
    token_reader: TokenReader | None
    """Set for formats whose rows are token ids."""
