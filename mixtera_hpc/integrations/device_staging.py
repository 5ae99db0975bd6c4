"""`DeviceStage`: arrays of a batch to the device, through pinned memory and on a stream of its own.

All arrays of a batch are written to one pinned buffer and copied by one transfer, which overlaps with the kernels of
the step before. The trainer's stream waits for the transfer, its thread does not. Pinned buffers are used again once
their transfer has ended. Price: one copy on the host, and the memory of as many batches as are in transfer, at most
`MAX_BUFFERS`, pinned. On a CPU nothing is copied.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DeviceStage"]

MAX_BUFFERS = 4
"""Pinned buffers. With so many transfers in progress the next batch waits for the oldest one."""

ALIGNMENT = 256
"""Bytes at a multiple of which every array begins."""


class DeviceStage:
    """The copy of arrays to one device. Not thread-safe: the thread that trains uses it."""

    def __init__(self, device: torch.device) -> None:
        """Allocate nothing yet."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # "cuda" without a number is another device after `torch.cuda.set_device`.
        self._device = device if self._stream is None else self._stream.device
        self._buffers: deque[tuple[Tensor, Any]] = deque()
        """Pinned buffers, each with the event that marks the end of its last transfer; the oldest first."""

    def copy(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Return the arrays as tensors on the device, ready for what the current stream runs next."""
        if self._stream is None:
            # Memory that is shared with a reading process is used again once no tensor refers to it.
            return [torch.from_numpy(_writeable(array)).to(self._device) for array in arrays]
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
        pinned = self._free_buffer(starts[-1])
        host = pinned.numpy()
        for start, array in zip(starts, arrays, strict=False):
            host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array

        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            staged = torch.empty(starts[-1], dtype=torch.uint8, device=self._device)
            staged.copy_(pinned[: starts[-1]], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._buffers.append((pinned, arrived))
        compute.wait_event(arrived)
        # The memory belongs to the transfer's stream; it must not be used again before the trainer's has read it.
        staged.record_stream(compute)
        return [
            staged[start : start + array.nbytes].view(_dtype_of(array)).view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def _free_buffer(self, num_bytes: int) -> Tensor:
        """Return a pinned buffer of at least `num_bytes` that no transfer reads."""
        if self._buffers and (self._buffers[0][1].query() or len(self._buffers) >= MAX_BUFFERS):
            pinned, arrived = self._buffers.popleft()
            arrived.synchronize()
            # A batch ramp needs larger buffers later; the small ones are dropped.
            if len(pinned) >= num_bytes:
                return pinned
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _writeable(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that torch may refer to."""
    return array if array.flags.writeable else array.copy()


def _dtype_of(array: NDArray[Any]) -> torch.dtype:
    """Return the data type of a tensor with the content of `array`."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
