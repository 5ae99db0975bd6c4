"""JSON lines compressed with LZMA (`.jsonl.xz`)."""

import lzma

from mixtera_hpc.formats.compressed import CompressedJsonl
from mixtera_hpc.formats.frames import Codec

__all__ = ["JsonlXz"]

MAX_DICTIONARY_BYTES = 1 << 30


def _start() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_DICTIONARY_BYTES)


class JsonlXz(CompressedJsonl):
    """`Format` of `.jsonl.xz` files; zeros between and after streams are padding."""

    def __init__(self) -> None:
        super().__init__("jsonl.xz", Codec(start=_start, errors=(lzma.LZMAError, EOFError), padding=b"\0"))
