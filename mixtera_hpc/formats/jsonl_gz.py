"""JSON lines compressed with gzip (`.jsonl.gz`), decoded by ISA-L."""

from typing import cast

from isal import igzip_lib, isal_zlib

from mixtera_hpc.formats.compressed import Codec, CompressedJsonl, Decompressor

__all__ = ["JsonlGz"]

GZIP_WRAPPER = 31
_ERROR = cast("type[Exception]", igzip_lib.IsalError)


def _start() -> Decompressor:
    started: Decompressor = isal_zlib.decompressobj(wbits=GZIP_WRAPPER)
    return started


class JsonlGz(CompressedJsonl):
    """`Format` of `.jsonl.gz` files; zeros after a member are padding, as gzip itself has it."""

    def __init__(self) -> None:
        super().__init__("jsonl.gz", Codec(start=_start, error=_ERROR, padding=b"\0"))
