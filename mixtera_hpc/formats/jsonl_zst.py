"""JSON lines compressed with Zstandard (`.jsonl.zst`)."""

import zstandard

from mixtera_hpc.formats.compressed import Codec, CompressedJsonl, Decompressor

__all__ = ["JsonlZst"]

MAX_WINDOW_BYTES = 1 << 31
"""Reads what `zstd --long=31` writes."""


def _start() -> Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()


class JsonlZst(CompressedJsonl):
    """`Format` of `.jsonl.zst` files; skippable frames (a seek table, say) hold no rows."""

    def __init__(self) -> None:
        super().__init__("jsonl.zst", Codec(start=_start, error=zstandard.ZstdError))
