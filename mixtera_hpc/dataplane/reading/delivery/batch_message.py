"""The message that carries one batch, or the end of the data, from the leader of a group to its peers.

A message has a fixed size: 32 bytes, 8 bytes per row and 9 bytes per token of the largest batch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import UserError

__all__ = ["BATCH", "END", "ERROR", "USER_ERROR", "BatchMessage"]

NUM_HEADER = 4
"""Integers in front of a message: its kind, training step, chunk, and the rows of a batch or the length of a text."""

BATCH, END, USER_ERROR, ERROR = range(4)
"""Kinds of messages. `END` also says that the trainer leaves before the end of the data."""


class BatchMessage:
    """A buffer that holds one batch, one error, or nothing but its kind."""

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        """Allocate the message for `num_rows` sequences of `num_tokens` tokens each."""
        self.buffer = np.zeros(8 * NUM_HEADER + num_rows * (8 + 8 * num_tokens + num_tokens - 1), np.uint8)
        self._header = self.buffer[: 8 * NUM_HEADER].view(np.int64)
        self._content = self.buffer[8 * NUM_HEADER :]
        shapes = (
            (np.dtype(np.int64), (num_rows,)),
            (np.dtype(np.int32), (num_rows, num_tokens)),
            (np.dtype(np.int32), (num_rows, num_tokens)),
            (np.dtype(np.bool_), (num_rows, num_tokens - 1)),
        )
        views: list[NDArray[Any]] = []
        begin = 0
        for dtype, shape in shapes:
            end = begin + dtype.itemsize * int(np.prod(shape))
            views.append(self._content[begin:end].view(dtype).reshape(shape))
            begin = end
        self.domain_ids, self.tokens, self.document_ids, self.loss_mask = views

    @property
    def kind(self) -> int:
        """`BATCH`, `END`, `USER_ERROR` or `ERROR`."""
        return int(self._header[0])

    @property
    def step(self) -> int:
        """Training step of the batch."""
        return int(self._header[1])

    @property
    def chunk(self) -> int:
        """Chunk of the batch."""
        return int(self._header[2])

    @property
    def count(self) -> int:
        """Rows of the batch, or bytes of the text."""
        return int(self._header[3])

    def put_batch(self, batch: Batch) -> None:
        """Write a batch."""
        # A batch ramp begins with smaller batches.
        count = len(batch.domain_ids)
        self._header[:] = BATCH, batch.step, batch.chunk, count
        self.domain_ids[:count] = batch.domain_ids
        self.tokens[:count] = batch.tokens
        self.document_ids[:count] = batch.document_ids
        self.loss_mask[:count] = batch.loss_mask

    def put_end(self) -> None:
        """Write that no batch follows."""
        self._header[:] = END, 0, 0, 0

    def put_error(self, error: BaseException) -> None:
        """Write the text of an error, as much of it as fits."""
        text = str(error).encode()[: len(self._content)]
        self._header[:] = USER_ERROR if isinstance(error, UserError) else ERROR, 0, 0, len(text)
        self._content[: len(text)] = np.frombuffer(text, np.uint8)

    def text(self) -> str:
        """Return the text of an error."""
        return self._content[: self.count].tobytes().decode(errors="replace")
