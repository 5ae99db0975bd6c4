"""JSON lines compressed with gzip (`.jsonl.gz`), decoded by ISA-L."""

from typing import cast

from isal import igzip_lib

from mixtera_hpc.formats.compressed import Codec, CompressedJsonl, Decompressor

__all__ = ["JsonlGz"]

_ERROR = cast("type[Exception]", igzip_lib.IsalError)


def _start() -> Decompressor:
    started: Decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return started


class JsonlGz(CompressedJsonl):
    """`Format` of `.jsonl.gz` files; zeros after a member are padding, as gzip itself has it."""

    def __init__(self) -> None:
        super().__init__("jsonl.gz", Codec(start=_start, errors=(_ERROR, EOFError), padding=b"\0"))
