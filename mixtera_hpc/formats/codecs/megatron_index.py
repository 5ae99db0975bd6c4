"""Read the `.idx` file of a Megatron-LM token file, which describes the sequences in the `.bin` file.

Layout, little-endian (Megatron-core, `megatron/core/datasets/indexed_dataset.py`):

- header: magic (9 bytes), version (8), code of the integer type (1), number of sequences (8), length of the document
  table (8)
- length of every sequence in tokens (int32 each), first byte of every sequence in the `.bin` file (int64 each)
- document table: the number of the first sequence of every document, and the number of sequences (int64 each)
- optional: one mode byte per sequence (multimodal data), ignored here
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.shard_errors import cannot_open_error

__all__ = ["DTYPES", "HEADER", "MAGIC", "VERSION", "TokenLayout", "read_document_starts", "read_token_layout"]

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's codes of integer types. 6 and 7 are floats, which cannot be token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Positions of the documents of a `.bin` file."""

    dtype: np.dtype[Any]
    """Type of the token ids."""
    starts: NDArray[np.int64]
    """First byte of every document, and the end of the last; shape (documents + 1,)."""


def read_token_layout(shard: Path) -> TokenLayout:
    """Read the `.idx` file next to a `.bin` file.

    Raises:
        DataError: it is missing, damaged, or not an index of integer ids.
    """
    path = shard.with_suffix(".idx")
    data = _map_file(path, shard)
    dtype, num_sequences, num_documents = _read_header(data, path)

    # Views of the mapped file: only the bytes that are used below are read from disk.
    lengths = np.frombuffer(data, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(data, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    table: NDArray[Any] = np.frombuffer(data, "<i8", num_documents, HEADER.size + 12 * num_sequences)
    # Without a document table, every sequence is a document.
    if len(table) < 2:
        table = np.arange(num_sequences + 1)

    # Bounds of the sequences, in bytes. The pointers repeat them, which shows damage.
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * dtype.itemsize])
    follow_each_other = bool(np.array_equal(pointers, bounds[:-1]) and (lengths >= 0).all())
    if not follow_each_other or not _is_partition(table, num_sequences):
        raise DataError(
            f"{path} is damaged: its sequences do not follow each other.\n"
            "  Copy it again, or exclude the shard with data.exclude."
        )
    return TokenLayout(dtype=dtype, starts=bounds[table])


def read_document_starts(shard: Path, documents: NDArray[np.int64]) -> tuple[np.dtype[Any], NDArray[np.int64]]:
    """Return the type of the ids, and the first byte of some documents in the `.bin` file; shape (len(documents),).

    Reads only what it returns, in contrast to `read_token_layout`, which reads and checks the whole `.idx` file.

    Raises:
        DataError: the file is missing, damaged, not an index of integer ids, or lacks a document.
    """
    path = shard.with_suffix(".idx")
    data = _map_file(path, shard)
    dtype, num_sequences, num_entries = _read_header(data, path)
    pointers = np.frombuffer(data, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    sequences: NDArray[Any] = documents
    if num_entries >= 2:
        table = np.frombuffer(data, "<i8", num_entries, HEADER.size + 12 * num_sequences)
        sequences = table[np.minimum(documents, num_entries - 1)]

    # Empty documents at the end begin at the size of the file, where no sequence does.
    has_sequence = (sequences >= 0) & (sequences < num_sequences)
    starts = np.full(len(documents), shard.stat().st_size, np.int64)
    starts[has_sequence] = pointers[sequences[has_sequence]]
    return dtype, starts


def _map_file(path: Path, shard: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise DataError(
            f"{shard} needs {path.name} beside it, which is missing.\n"
            "  Copy it there. If the shard is not a Megatron file, exclude it with data.exclude."
        ) from None
    except OSError as error:
        raise cannot_open_error(path, error) from None
    except ValueError:
        # A file of 0 bytes cannot be mapped.
        raise DataError(f"{path} has 0 bytes.\n  Copy it again, or exclude the shard with data.exclude.") from None


def _read_header(data: NDArray[np.uint8], path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return the type of the ids, the number of sequences and the length of the document table."""
    # Pad a shorter file with zeros, so that its magic can be shown in the message.
    header = bytes(data[: HEADER.size]).ljust(HEADER.size, b"\0")
    magic, version, code, num_sequences, num_documents = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise DataError(
            f"{path} is not the index of a Megatron file of integer ids: magic {magic!r}, version {version}, type code "
            f"{code}.\n"
            "  Write the file again with integer ids, or exclude its .bin file with data.exclude."
        )

    # int32 length and int64 pointer of every sequence, int64 entry for every document.
    size = HEADER.size + 12 * num_sequences + 8 * num_documents
    size_with_modes = size + num_sequences
    if len(data) not in (size, size_with_modes):
        problem = "truncated" if len(data) < size else "too long"
        raise DataError(
            f"{path} is {problem}: it has {len(data)} bytes, but its header needs {size}.\n  Copy it again."
        )
    return np.dtype(DTYPES[code]), num_sequences, num_documents


def _is_partition(table: NDArray[Any], num_sequences: int) -> bool:
    """Return True if the document table goes from the first sequence to the last without a step back."""
    # Bounds first: the difference of two numbers beyond them may overflow to a positive one.
    is_bounded = bool(((table >= 0) & (table <= num_sequences)).all())
    return is_bounded and bool(table[0] == 0 and table[-1] == num_sequences and (np.diff(table) >= 0).all())
