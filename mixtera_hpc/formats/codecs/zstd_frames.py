"""Decode Zstandard frames (RFC 8878) with bounded output."""

import zstandard

from mixtera_hpc.formats.codecs.frames import Codec

__all__ = ["ZSTD"]

# The window of `zstd --long=31`, the largest one that the zstd program writes.
MAX_WINDOW_BYTES = 1 << 31
# Compressed bytes per call. The library cannot limit what one call decodes; from this much input it is 128 MiB at the
# format's highest ratio, and usually some 15 kB.
FEED_BYTES = 4 << 10
MIN_FEED_BYTES = 64
# A call that decodes more than this is followed by one with less input.
LARGE_OUTPUT_BYTES = 1 << 20


class _ZstdFrame:
    """`Decompressor` of one frame, fed at most `FEED_BYTES` at a time."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self._pending = memoryview(b"")
        self._feed_bytes = FEED_BYTES // 8

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def needs_input(self) -> bool:
        return not self._pending

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + bytes(self._pending)

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Decode until `max_length` bytes are reached; one feed may exceed it."""
        # New input comes behind what is left of the last one; nothing is copied if nothing is left.
        if data:
            self._pending = memoryview(bytes(self._pending) + data) if self._pending else memoryview(data)
        decoded = []
        size = 0
        # Stop at the end of the frame: the bytes behind it are `unused_data`.
        while self._pending and size < max_length and not self._frame.eof:
            data = self._frame.decompress(self._pending[: self._feed_bytes])
            self._pending = self._pending[self._feed_bytes :]
            decoded.append(data)
            size += len(data)
            if len(data) > LARGE_OUTPUT_BYTES:
                self._feed_bytes = max(self._feed_bytes // 2, MIN_FEED_BYTES)
            elif self._feed_bytes < FEED_BYTES:
                self._feed_bytes *= 2
        return b"".join(decoded)


ZSTD = Codec(start=_ZstdFrame, errors=(zstandard.ZstdError,))
"""Skippable frames (a seek table, for example) decode to nothing."""
