"""Divide consecutive samples of any size into blocks, for formats whose samples may hold images."""

__all__ = ["SampleBlocks"]

BLOCK_BYTES = 64 << 20


class SampleBlocks:
    """Divides samples into blocks of `block_rows` samples or `BLOCK_BYTES`, whichever comes first."""

    def __init__(self, start: int, block_rows: int) -> None:
        self._block_rows = block_rows
        self._start = start
        self._end = start
        self._rows = 0
        self._full: list[tuple[int, int, int]] = []

    def add(self, end: int) -> None:
        """Add the next sample, which ends at byte `end`."""
        self._end = end
        self._rows += 1
        if self._rows >= self._block_rows or end - self._start >= BLOCK_BYTES:
            self.close_block()

    def close_block(self) -> None:
        """End the current block, if it has any samples."""
        if self._rows:
            self._full.append((self._start, self._end - self._start, self._rows))
            self._start = self._end
            self._rows = 0

    def take(self) -> list[tuple[int, int, int]]:
        """Return the (offset, length, rows) of the blocks ended since the last call."""
        full, self._full = self._full, []
        return full
