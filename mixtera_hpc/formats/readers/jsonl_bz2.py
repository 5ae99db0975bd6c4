"""JSON lines compressed with bzip2 (`.jsonl.bz2`); the files of `pbzip2` and `lbzip2` have a stream per 900 kB."""

import bz2

from mixtera_hpc.formats.codecs.frames import Codec
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat

__all__ = ["JsonlBz2Format"]


class JsonlBz2Format(CompressedJsonlFormat):
    """`Format` of `.jsonl.bz2` files; a block is a run of streams that ends where a line does."""

    def __init__(self) -> None:
        super().__init__("jsonl.bz2", Codec(start=bz2.BZ2Decompressor, errors=(OSError, EOFError)))
