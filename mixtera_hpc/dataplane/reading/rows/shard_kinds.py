"""Tell how the rows of a shard are read: by a decoder of rows, by whole blocks, or row by row."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import RowDecoder, RowFormat
from mixtera_hpc.formats.composed_text import is_composed
from mixtera_hpc.formats.registry import load_format

__all__ = ["BLOCKS", "FIRST_DECODER", "ROWS", "ShardKinds"]

# How a shard is read: not known yet, by its reader row by row, or by decoding whole blocks. A kind of FIRST_DECODER or
# more is the number of a decoder.
_UNKNOWN, ROWS, BLOCKS, FIRST_DECODER = range(4)


class ShardKinds:
    """The kind of reading of every shard, as far as it is known."""

    def __init__(self, formats: Sequence[str], texts: Sequence[str | None]) -> None:
        """Begin without a known shard.

        Args:
            formats: name of the format of each shard.
            texts: path of the text of each shard.
        """
        self._formats = formats
        self._texts = texts
        self._kinds = np.zeros(len(formats), np.int16)
        self._of_format: dict[tuple[str, str | None], int] = {}
        """Format and text path of shards whose kind is known before they are opened → kind."""
        self.decoders: list[RowDecoder] = []

    def of(self, shards: NDArray[np.int32], kind_of_opened: Callable[[int], int]) -> NDArray[np.int16]:
        """Return how each of `shards` is read.

        Args:
            shards: numbers of shards.
            kind_of_opened: opens a shard whose rows have no decoder, and returns its kind.
        """
        kinds = self._kinds[shards]
        if (kinds == _UNKNOWN).any():
            for number in np.unique(shards[kinds == _UNKNOWN]).tolist():
                self._kinds[number] = self._of_closed(number) or kind_of_opened(number)
            kinds = self._kinds[shards]
        return kinds

    def _of_closed(self, number: int) -> int:
        """Return the kind of a shard whose rows have a decoder, else `_UNKNOWN`."""
        name = self._formats[number]
        text = self._texts[number]
        if (name, text) not in self._of_format:
            kind = _UNKNOWN
            row_format = load_format(name)
            if isinstance(row_format, RowFormat) and not is_composed(text):
                kind = FIRST_DECODER + len(self.decoders)
                self.decoders.append(row_format.row_decoder(text))
            self._of_format[name, text] = kind
        return self._of_format[name, text]
