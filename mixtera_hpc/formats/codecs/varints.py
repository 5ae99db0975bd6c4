"""Decode and encode variable-length integers of binary formats: seven bits per byte, low first."""

__all__ = ["encode_varint", "read_varint"]

MAX_BITS = 64


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it.

    Raises:
        IndexError: the data ends inside it.
        ValueError: it has more than 64 bits.
    """
    value = 0
    shift = 0
    while True:
        byte = data[position]
        # The highest bit says that another byte follows.
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if not byte & 0x80:
            return value, position
        if shift >= MAX_BITS:
            raise ValueError(f"a number has more than {MAX_BITS} bits")


def encode_varint(value: int) -> bytes:
    """Return the bytes of an integer that is not negative."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
