"""JSON lines compressed with bzip2 (`.jsonl.bz2`). The files of `pbzip2` and `lbzip2` have one stream per 900 kB."""

from mixtera_hpc.formats.codecs.bzip2_streams import BZIP2
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat

__all__ = ["JsonlBz2Format"]


class JsonlBz2Format(CompressedJsonlFormat):
    """`Format` of `.jsonl.bz2` files. A block is a run of streams that ends where a line ends."""

    def __init__(self) -> None:
        super().__init__("jsonl.bz2", BZIP2)
