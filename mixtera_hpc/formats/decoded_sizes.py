"""Estimate how many bytes the blocks of a shard decode to, from what an index stores.

An index stores the bytes that a block has on disk. Windows of the shuffle are counted in decoded bytes, and every rank
and every attempt must count the same, so a fixed factor per format is used and nothing is measured.
"""

__all__ = ["decodes_blocks", "decodes_files", "expansion_of"]

_TYPICAL_EXPANSION = {"jsonl.gz": 3.0, "jsonl.zst": 3.0, "jsonl.bz2": 4.0, "jsonl.xz": 4.0, "parquet": 2.0}
"""Name of a compressed format → decoded bytes per byte of a typical text. The other formats store decoded bytes."""


def expansion_of(format_name: str, block_bytes: int, size_bytes: int) -> float:
    """Return the decoded bytes per byte that an index counts in the blocks of a shard.

    Args:
        format_name: format of the shard.
        block_bytes: sum of the lengths of all blocks of the shard.
        size_bytes: size of the file.
    """
    # The blocks of long gzip members are counted in decoded bytes, so they have more bytes than the file.
    return 1.0 if block_bytes > size_bytes else _TYPICAL_EXPANSION.get(format_name, 1.0)


def decodes_files(format_name: str) -> bool:
    """Return True for compressed files that, as most people write them, can only be decoded as a whole."""
    # Row groups of Parquet are smaller than a file.
    return decodes_blocks(format_name) and format_name != "parquet"


def decodes_blocks(format_name: str) -> bool:
    """Return True if reading one row of the format decodes its whole block."""
    return format_name in _TYPICAL_EXPANSION
