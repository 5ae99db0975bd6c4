"""Decode the samples of MDS shards (MosaicML Streaming): the sizes of the columns, then their bytes.

Images stay bytes. Encodings that need another library, or that run code (`pkl`), are refused by name.
"""

import itertools
import math
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.batching.json_payloads import decode_payload
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS, json_problem

__all__ = ["ENCODINGS", "MdsColumn", "MdsSampleDecoder", "is_known_encoding"]

Decode = Callable[[bytes], Any]

# Encoding of numbers of a fixed size → format character of `struct`.
_NUMBERS = {
    "int": "q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "float16": "e",
    "float32": "f",
    "float64": "d",
}
# Number that stands for the type of an array's values → the type.
_ARRAY_TYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
_SHAPE_TYPES = ("<u1", "<u2", "<u4", "<u8")


@dataclass(frozen=True, slots=True, kw_only=True)
class MdsColumn:
    """One column of a shard."""

    name: str
    encoding: str
    size: int
    """Bytes of every value; 0 if every sample says it."""


class MdsSampleDecoder:
    """Decodes samples of the same columns."""

    def __init__(self, columns: Sequence[MdsColumn]) -> None:
        self._columns = tuple(columns)
        self._sizes = struct.Struct(f"<{sum(not column.size for column in columns)}I")
        self._decoders = [_decoder_of(column.encoding) for column in columns]

    def decode(self, data: bytes, names: Collection[str] | None = None) -> dict[str, Any]:
        """Decode one sample: all columns, or those of `names`.

        Raises:
            ValueError: the bytes are no such sample.
        """
        if len(data) < self._sizes.size:
            raise ValueError(f"the sample has {len(data)} bytes, too few for the sizes of its columns")
        stored_sizes = iter(self._sizes.unpack_from(data))
        sizes = [column.size or next(stored_sizes) for column in self._columns]
        bounds = list(itertools.accumulate(sizes, initial=self._sizes.size))
        if bounds[-1] != len(data):
            raise ValueError(f"the sample has {len(data)} bytes, but its columns have {bounds[-1]}")
        return {
            column.name: _decode_value(column, decode, data[start:stop])
            for column, decode, start, stop in zip(self._columns, self._decoders, bounds[:-1], bounds[1:], strict=True)
            if names is None or column.name in names
        }


def is_known_encoding(encoding: str) -> bool:
    """Return True if values of this encoding can be decoded."""
    try:
        _decoder_of(encoding)
    except ValueError:
        return False
    return True


def _decoder_of(encoding: str) -> Decode:
    """Return the function that decodes values of an encoding.

    Raises:
        ValueError: the encoding is unknown.
    """
    name, _, arguments = encoding.partition(":")
    if name == "ndarray":
        return _array_decoder(arguments)
    if arguments or encoding not in _DECODERS:
        raise ValueError(f"unknown encoding {encoding!r}")
    return _DECODERS[encoding]


def _decode_value(column: MdsColumn, decode: Decode, data: bytes) -> Any:
    try:
        return decode(data)
    except JSON_ERRORS as error:
        # Only JSON has places to point at.
        problem = json_problem(data, error) if column.encoding == "json" else str(error)
        raise ValueError(f"column {column.name!r}: {problem}") from None
    except (ValueError, struct.error) as error:
        raise ValueError(f"column {column.name!r} of encoding {column.encoding}: {error}") from None


def _number_decoder(character: str) -> Decode:
    layout = struct.Struct(f"<{character}")
    return lambda data: layout.unpack(data)[0]


def _array_decoder(arguments: str) -> Decode:
    """Return the decoder of `ndarray`, `ndarray:TYPE` or `ndarray:TYPE:SHAPE`.

    Raises:
        ValueError: the type or the shape is unknown.
    """
    type_name, _, shape_text = arguments.partition(":")
    if type_name and type_name not in _ARRAY_TYPES.values():
        raise ValueError(f"unknown type of array values {type_name!r}")
    shape = tuple(map(int, shape_text.split(","))) if shape_text else None
    return lambda data: _decode_array(data, type_name, shape)


def _decode_array(data: bytes, type_name: str, shape: tuple[int, ...] | None) -> NDArray[Any]:
    """Decode an array. What the encoding does not fix comes first in the data: the type, then the shape.

    Raises:
        ValueError: the data is no such array.
    """
    position = 0
    if not type_name:
        if data[:1] == b"" or data[0] not in _ARRAY_TYPES:
            raise ValueError("the array has no known type of values")
        type_name = _ARRAY_TYPES[data[0]]
        position = 1
    if shape is None:
        shape, position = _decode_shape(data, position)
    value_type = np.dtype(type_name).newbyteorder("<")
    if len(data) - position != math.prod(shape) * value_type.itemsize:
        raise ValueError(f"an array of {type_name} and shape {shape} does not have {len(data) - position} bytes")
    return np.frombuffer(data, value_type, offset=position).reshape(shape)


def _decode_shape(data: bytes, position: int) -> tuple[tuple[int, ...], int]:
    """Return the shape that is stored at `position`, and the position after it."""
    if position >= len(data):
        raise ValueError("the array has no shape")
    # Six bits are the number of dimensions, two the type of the shape's numbers.
    num_dimensions = data[position] >> 2
    shape_type = np.dtype(_SHAPE_TYPES[data[position] & 3])
    end = position + 1 + num_dimensions * shape_type.itemsize
    if end > len(data):
        raise ValueError("the array ends inside its shape")
    shape = np.frombuffer(data, shape_type, num_dimensions, position + 1)
    return tuple(shape.tolist()), end


# Encoding → decoder of one value.
_DECODERS: dict[str, Decode] = {
    "bytes": bytes,
    "jpeg": bytes,
    "png": bytes,
    "str": bytes.decode,
    "json": decode_payload,
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    **{name: _number_decoder(character) for name, character in _NUMBERS.items()},
}

ENCODINGS = (*sorted(_DECODERS), "ndarray")
"""Names of the encodings that can be read."""
