"""JSON lines compressed with Zstandard (`.jsonl.zst`)."""

import zstandard

from mixtera_hpc.formats.codecs.frames import Codec
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat

__all__ = ["JsonlZstFormat"]

MAX_WINDOW_BYTES = 1 << 31
"""Reads what `zstd --long=31` writes."""
FEED_BYTES = 8 << 10
"""The library has no bound on what one call decodes: at the format's highest ratio this is 256 MiB, usually some 30 kB."""


class _Frame:
    """One frame, fed in small bites."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self._pending = memoryview(b"")

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
        """Decode some of what was fed; may be longer than `max_length` by one bite's worth."""
        if data:
            self._pending = memoryview(bytes(self._pending) + data) if self._pending else memoryview(data)
        found, size = [], 0
        while self._pending and size < max_length and not self._frame.eof:
            found.append(self._frame.decompress(self._pending[:FEED_BYTES]))
            self._pending = self._pending[FEED_BYTES:]
            size += len(found[-1])
        return b"".join(found)


class JsonlZstFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.zst` files; skippable frames (a seek table, say) hold no rows."""

    def __init__(self) -> None:
        super().__init__("jsonl.zst", Codec(start=_Frame, errors=(zstandard.ZstdError,)))
