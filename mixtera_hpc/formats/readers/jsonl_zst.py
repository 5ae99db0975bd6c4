"""JSON lines compressed with Zstandard (`.jsonl.zst`)."""

from mixtera_hpc.formats.codecs.zstd_frames import ZSTD
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat

__all__ = ["JsonlZstFormat"]


class JsonlZstFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.zst` files. A block is a run of frames that ends where a line ends."""

    def __init__(self) -> None:
        super().__init__("jsonl.zst", ZSTD)
