"""Read structs of Thrift's compact protocol, in which Parquet writes the headers of its pages.

Lengths and counts in a damaged struct can be any number of 64 bits. Nothing is allocated for them, and a value of fixed
size is skipped without a loop, so a struct costs at most `MAX_VALUES` steps.
"""

from typing import Any

from mixtera_hpc.formats.codecs.varints import read_varint

__all__ = ["MAX_VALUES", "read_struct"]

MAX_VALUES = 1024
"""Largest number of values in a struct, at any depth; a page header of Parquet has about 25."""
MAX_DEPTH = 8
"""Largest number of structs and lists inside each other; a page header of Parquet has 3."""
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Bytes of an item of a list. A boolean is part of the field's type in a struct, and a byte of its own in a list.
_FIXED_BYTES = {_TRUE: 1, _FALSE: 1, _BYTE: 1, _DOUBLE: 8}


def read_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Return the numbers and structs of a struct by the number of their field, and the position after it.

    Texts and collections are skipped. Their field has the value None.

    Raises:
        IndexError: the data ends inside the struct.
        ValueError: the struct has too many values or levels, or a type that page headers do not have.
    """
    reader = _StructReader(data, position)
    fields = reader.read_struct(0)
    return fields, reader.position


class _StructReader:
    """A reader of one value after the other.

    A text or list that is skipped may end after the data: the read of the byte that ends its struct then fails.
    """

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.position = position
        self._values_left = MAX_VALUES

    def read_struct(self, depth: int) -> dict[int, Any]:
        """Return the fields of a struct inside `depth` others."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._read_byte():
            if head >> 4:
                number += head >> 4
            else:
                number = self._read_signed()
            kind = head & 15
            self._count_values(1)
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._read_value(kind, depth)
        return fields

    def _read_value(self, kind: int, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            raise ValueError(f"a page header has more than {MAX_DEPTH} structs inside each other")
        if kind == _BYTE:
            return self._read_byte()
        if kind in (_I16, _I32, _I64):
            return self._read_signed()
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        if kind == _DOUBLE:
            self.position += _FIXED_BYTES[_DOUBLE]
        elif kind == _BINARY:
            size = self._read_unsigned()
            self.position += size
        elif kind in (_LIST, _SET):
            self._skip_list(depth + 1)
        else:
            raise ValueError(f"a page header has a field of the unknown type {kind}")
        return None

    def _skip_list(self, depth: int) -> None:
        head = self._read_byte()
        kind = head & 15
        count = head >> 4
        if count == 15:
            count = self._read_unsigned()
        if kind in _FIXED_BYTES:
            self.position += count * _FIXED_BYTES[kind]
            return
        self._count_values(count)
        for _ in range(count):
            self._read_value(kind, depth)

    def _count_values(self, count: int) -> None:
        self._values_left -= count
        if self._values_left < 0:
            raise ValueError(f"a page header has more than {MAX_VALUES} values")

    def _read_byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _read_signed(self) -> int:
        """Return a zigzag-coded integer."""
        value = self._read_unsigned()
        return (value >> 1) ^ -(value & 1)

    def _read_unsigned(self) -> int:
        value, self.position = read_varint(self._data, self.position)
        return value
