"""Refuse a Parquet row group that decodes to more than a limit, before the memory is taken."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.codecs.limits.parquet_pages import ChunkSize, chunk_size
from mixtera_hpc.formats.shard_errors import open_shard, unreadable_error

__all__ = ["check_row_group", "row_group_error"]

EXACT_BATCH_ROWS = 8192


def row_group_error(path: Path, group: int, size_bytes: int, limit: int) -> DataError:
    """Return the error for a row group that is too large."""
    return DataError(
        f"{path}: row group {group} decodes to {size_bytes} bytes or more, beyond data.max_block_bytes={limit}.\n"
        "  Write the file again with smaller row groups, or raise data.max_block_bytes."
    )


def check_row_group(path: Path, file: Any, group: int, columns: Collection[str] | None, limit: int) -> None:
    """Check the decoded size of the wanted columns of one row group.

    Args:
        path: the shard.
        file: the shard, opened by pyarrow.
        group: number of the row group.
        columns: names or dotted paths of the wanted columns; None for all.
        limit: `data.max_block_bytes`.

    Raises:
        DataError: they decode to more than `limit` bytes, or a page is damaged.
    """
    metadata = file.metadata.row_group(group)
    # A row group without rows need not have pages.
    if not metadata.num_rows:
        return
    descriptor = open_shard(path)
    try:
        # Names that are no text are a kind of ValueError.
        numbers = [i for i in range(metadata.num_columns) if _is_wanted(metadata.column(i).path_in_schema, columns)]
        sizes = [_chunk_size(descriptor, file, metadata.column(i), i, limit) for i in numbers]
    except (ValueError, IndexError, TypeError) as error:
        raise unreadable_error(path, f"row group {group}", error) from None
    finally:
        os.close(descriptor)

    # What is stored once and occurs often is counted exactly only if the upper bound is too high.
    certain = sum(size.pages + size.values for size in sizes)
    if certain <= limit < sum(size.bound for size in sizes):
        for number, size in zip(numbers, sizes, strict=True):
            if size.repeated and certain <= limit:
                certain += _exact_bytes(path, group, metadata.column(number).path_in_schema, size, limit)
    if certain > limit:
        raise row_group_error(path, group, certain, limit)


def _is_wanted(path: str, columns: Collection[str] | None) -> bool:
    return columns is None or any(path == name or path.startswith(f"{name}.") for name in columns)


def _chunk_size(descriptor: int, file: Any, column: Any, number: int, limit: int) -> ChunkSize:
    length = file.schema.column(number).length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
    return chunk_size(descriptor, column, length, limit)


def _exact_bytes(path: Path, group: int, column: str, size: ChunkSize, limit: int) -> int:
    """Return the bytes of all texts of a column without decoding them: a dictionary is read as such."""
    total = 0
    rows = EXACT_BATCH_ROWS
    dictionaries = [column]
    if size.has_deltas:
        # pyarrow makes no dictionary of them, and each may be as long as all pages. Its buffers double as they grow.
        rows = max(1, min(EXACT_BATCH_ROWS, limit // 4 // max(size.pages, 1)))
        dictionaries = []
    try:
        with pq.ParquetFile(path, read_dictionary=dictionaries) as file:
            for batch in file.iter_batches(rows, [group], [column], use_threads=False):
                total += sum(_text_bytes(array) for array in batch.columns)
                if total > limit:
                    break
    except (pa.ArrowException, OSError) as error:
        raise unreadable_error(path, f"row group {group}", error) from None
    return total


def _text_bytes(array: Any) -> int:
    """Return the bytes of all texts in an array, at any depth."""
    return sum(_leaf_bytes(leaf) for leaf in _leaves(array))


def _leaf_bytes(leaf: Any) -> int:
    if not pa.types.is_dictionary(leaf.type):
        return int(leaf.nbytes)
    lengths = pc.binary_length(leaf.dictionary).take(leaf.indices)
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)


def _leaves(array: Any) -> Iterator[Any]:
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _leaves(child)
    elif pa.types.is_nested(array.type):
        yield from _leaves(array.flatten())
    else:
        yield array
