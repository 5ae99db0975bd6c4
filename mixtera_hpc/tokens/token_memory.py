"""An array of token ids that grows."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenMemory"]

FIRST_TOKENS = 1 << 16
"""Tokens for which memory is allocated at the beginning."""
MAX_TOKENS = 1 << 24
"""Most tokens for which memory stays allocated after `clear`."""

Tokens = NDArray[np.uint32]


class TokenMemory:
    """Tokens that follow each other. After `clear`, the same memory is filled again, while it is in the cache."""

    def __init__(self) -> None:
        self._array: Tokens = np.empty(FIRST_TOKENS, np.uint32)
        self.size = 0
        """Number of tokens."""

    @property
    def tokens(self) -> Tokens:
        """All tokens; until the next `append`, `clear` or `truncate`."""
        return self._array[: self.size]

    def clear(self) -> None:
        """Remove all tokens."""
        if len(self._array) > MAX_TOKENS:
            self._array = np.empty(FIRST_TOKENS, np.uint32)
        self.size = 0

    def truncate(self, size: int) -> None:
        """Remove all tokens but the first `size`."""
        self.size = size

    def append(self, tokens: Tokens) -> int:
        """Add tokens; return the position of the first one."""
        first = self.size
        size = first + len(tokens)
        if size > len(self._array):
            larger = np.empty(2 * size, np.uint32)
            larger[:first] = self._array[:first]
            self._array = larger
        self._array[first:size] = tokens
        self.size = size
        return first
