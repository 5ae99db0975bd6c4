"""Bound the decoded size of Arrow record batches from their metadata, before a compressed buffer is decoded.

pyarrow decodes a whole batch at once and has no limit. The metadata of a batch (a flatbuffer) says where its buffers
lie, and each compressed buffer begins with its decoded length. Price: one walk over the metadata of every batch per
open, 10 µs for each, only for files that are compressed. References are to the Arrow columnar format, version 1.5.
"""

import struct
from collections.abc import Collection, Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["batch_sizes", "text_bytes"]

_MAGIC = b"ARROW1"
# Position of the first message of a file: the magic is padded to eight bytes.
_FIRST_MESSAGE = 8
_CONTINUATION = 0xFFFFFFFF
_DICTIONARY_BATCH = 2
_RECORD_BATCH = 3
# A buffer with this decoded length is stored as it is.
_NOT_COMPRESSED = -1
_BLOCK = struct.Struct("<qi4xq")
_BUFFER = struct.Struct("<qq")


def batch_sizes(source: Any, columns: Collection[int] | None, schema: Any) -> tuple[int, list[int]]:
    """Return the decoded bytes of compressed buffers: of all dictionaries, and of each record batch.

    Args:
        source: the file or stream, memory mapped.
        columns: positions of the columns that count; None for all.
        schema: of the file.

    Raises:
        ValueError: the metadata is damaged.
    """
    source.seek(0)
    data = memoryview(source.read_buffer())
    wanted = None if columns is None else _wanted_buffers(schema, columns)
    dictionaries = 0
    batches = []
    try:
        for kind, table, body in _messages(data):
            size = _decoded_bytes(data, table, body, wanted if kind == _RECORD_BATCH else None)
            if kind == _RECORD_BATCH:
                batches.append(size)
            else:
                dictionaries += size
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"its metadata is damaged: {error}") from None
    return dictionaries, batches


def text_bytes(array: Any) -> int:
    """Return the decoded bytes of texts that are stored once and may occur often: dictionaries and views, any depth."""
    if pa.types.is_struct(array.type):
        return sum(text_bytes(array.field(i)) for i in range(array.type.num_fields))
    if pa.types.is_dictionary(array.type):
        return _dictionary_bytes(array)
    if array.type in (pa.string_view(), pa.binary_view()):
        return _view_bytes(array)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_map(array.type):
        return text_bytes(array.flatten())
    return 0


def _dictionary_bytes(array: Any) -> int:
    values = array.dictionary
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return 0
    lengths = pc.binary_length(values).cast(pa.int64()).take(array.indices)
    return int(pc.sum(lengths).as_py() or 0)


def _view_bytes(array: Any) -> int:
    """Return the sum of the lengths of views, each of which begins with its length in four bytes."""
    views = np.frombuffer(array.buffers()[1], "<i4")[0::4][array.offset : array.offset + len(array)]
    if array.null_count:
        views = views[array.is_valid().to_numpy(zero_copy_only=False)]
    return int(views.sum(dtype=np.int64))


def _messages(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield kind, position of the batch's table and first byte of the body of every batch."""
    is_file = bytes(data[: len(_MAGIC)]) == _MAGIC
    for start, body in _blocks(data) if is_file else _whole_stream(data):
        message = _root(data, start)
        kind = _kind(data, start)
        header = _pointer(data, message, 2)
        if kind == _DICTIONARY_BATCH:
            header = _pointer(data, header, 1)
        if kind in (_DICTIONARY_BATCH, _RECORD_BATCH):
            yield kind, header, body


def _blocks(data: memoryview) -> Iterator[tuple[int, int]]:
    """Yield the positions of the metadata and of the body of every batch that the footer of a file names."""
    end = len(data) - len(_MAGIC) - 4
    (length,) = struct.unpack_from("<i", data, end)
    footer = _root(data, end - length)
    batches_end = _FIRST_MESSAGE
    for field in (2, 3):
        for position in _vector(data, footer, field, _BLOCK.size):
            offset, metadata_bytes, body_bytes = _BLOCK.unpack_from(data, position)
            yield _metadata_start(data, offset)[0], offset + metadata_bytes
            batches_end = max(batches_end, offset + metadata_bytes + body_bytes)

    # What follows the last batch is the end mark, or the footer.
    if any(_kind(data, start) == _RECORD_BATCH for start, _ in _stream_positions(data[: end - length], batches_end)):
        raise ValueError("its footer does not list all of its record batches")


def _whole_stream(data: memoryview) -> Iterator[tuple[int, int]]:
    """Yield the positions of the messages of a stream, which must end with its end mark."""
    end = yield from _stream_positions(data, 0)
    if end is None:
        raise ValueError("it has no end mark: it was cut off, or its writer was not closed")
    if end < len(data):
        raise ValueError(f"it goes on behind its end mark, which ends at byte {end}")


def _stream_positions(data: memoryview, position: int) -> Generator[tuple[int, int], None, int | None]:
    """Yield the positions of the metadata and of the body of every message.

    Returns:
        The first byte behind the end mark; None if there is none.
    """
    while position + 4 <= len(data):
        start, length = _metadata_start(data, position)
        if not length:
            return start
        body = start + length
        yield start, body
        body_bytes = _scalar(data, _root(data, start), 3, "<q")
        # It would lead back to an earlier message, again and again.
        if body_bytes < 0:
            raise ValueError(f"a message has a body of {body_bytes} bytes")
        position = body + body_bytes
    return None


def _kind(data: memoryview, start: int) -> int:
    """Return the type of a message."""
    return _scalar(data, _root(data, start), 1, "<B")


def _metadata_start(data: memoryview, position: int) -> tuple[int, int]:
    """Return the first byte and the length of the metadata of a message; old files have no continuation mark."""
    (length,) = struct.unpack_from("<I", data, position)
    if length != _CONTINUATION:
        return position + 4, length
    if position + 8 > len(data):
        return position + 4, 0
    return position + 8, struct.unpack_from("<I", data, position + 4)[0]


def _decoded_bytes(data: memoryview, table: int, body: int, wanted: Collection[int] | None) -> int:
    """Return the sum of the decoded lengths of a batch's compressed buffers."""
    if not _pointer(data, table, 3):
        return 0
    total = 0
    for number, position in enumerate(_vector(data, table, 2, _BUFFER.size)):
        offset, length = _BUFFER.unpack_from(data, position)
        if length >= 8 and (wanted is None or number in wanted):
            (decoded,) = struct.unpack_from("<q", data, body + offset)
            total += 0 if decoded == _NOT_COMPRESSED else max(decoded, 0)
    return total


def _wanted_buffers(schema: Any, columns: Collection[int]) -> Collection[int] | None:
    """Return the numbers of the buffers of some columns; None if a type has no fixed number of buffers."""
    wanted: set[int] = set()
    first = 0
    for number, field in enumerate(schema):
        count = _num_buffers(field.type)
        if count is None:
            return None
        if number in columns:
            wanted.update(range(first, first + count))
        first += count
    return wanted


def _num_buffers(arrow_type: Any) -> int | None:
    types = pa.types
    if types.is_null(arrow_type):
        return 0
    if types.is_dictionary(arrow_type) or (types.is_primitive(arrow_type) or types.is_fixed_size_binary(arrow_type)):
        return 2
    if types.is_decimal(arrow_type):
        return 2
    if arrow_type in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return 3
    own = 1 if types.is_struct(arrow_type) or types.is_fixed_size_list(arrow_type) else 2
    if own == 2 and not (types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_map(arrow_type)):
        return None
    children = [_num_buffers(arrow_type.field(i).type) for i in range(arrow_type.num_fields)]
    return None if None in children else own + sum(count for count in children if count is not None)


# Flatbuffers: a table points back to its vtable, which has the offset of every field, 0 for a field that is missing.


def _root(data: memoryview, start: int) -> int:
    return start + int(struct.unpack_from("<I", data, start)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the position of a field; 0 if it is missing."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _scalar(data: memoryview, table: int, number: int, layout: str) -> int:
    position = _field(data, table, number)
    return int(struct.unpack_from(layout, data, position)[0]) if position else 0


def _pointer(data: memoryview, table: int, number: int) -> int:
    """Return the position that a field points to; 0 if it is missing."""
    position = _field(data, table, number)
    return position + int(struct.unpack_from("<I", data, position)[0]) if position else 0


def _vector(data: memoryview, table: int, number: int, item_bytes: int) -> Iterator[int]:
    """Yield the position of every item of a vector of structs."""
    position = _pointer(data, table, number)
    if position:
        (count,) = struct.unpack_from("<I", data, position)
        if position + 4 + count * item_bytes > len(data):
            raise ValueError(f"a list of {count} items ends after the file")
        for i in range(count):
            yield position + 4 + i * item_bytes
