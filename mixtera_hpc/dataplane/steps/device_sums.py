"""Losses on an accelerator: summed there by sequence and by domain, and copied to the host once per step.

Nothing waits for the device before the step is reduced, one step later: the sums of all micro-batches are added in the
trainer's stream, and one copy to pinned memory follows the last one. Integers make the sums independent of the order
in which the device adds. Price: 1 byte per token to the device (the loss mask), and to the host 32 bytes per domain of
the batch and 24 bytes per sequence.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS
from mixtera_hpc.core.statistics import QUANTA_PER_NAT as STATISTICS_QUANTA_PER_NAT
from mixtera_hpc.dataplane.steps.loss_sums import MAX_QUANTA, QUANTA_PER_NAT, WRAP_LIMIT, Ints, Rows, SequenceSums

__all__ = ["DeviceSums", "HostCopy"]


class HostCopy:
    """The content that a tensor has at this place of its device's stream, on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy. A tensor on the CPU is copied at once."""
        is_cuda = tensor.device.type == "cuda"
        # Only a copy to pinned memory is asynchronous. torch keeps pinned memory and uses it again.
        self._content = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
        self._content.copy_(tensor, non_blocking=is_cuda)
        self._arrived: Any = None
        """Event behind the copy; None for a copy that was complete at once."""
        if is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        """True if the copy has ended."""
        return self._arrived is None or bool(self._arrived.query())

    def array(self) -> NDArray[Any]:
        """Return the content; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        content: NDArray[Any] = self._content.numpy()
        return content


class DeviceSums:
    """The losses of one step that were recorded on one device."""

    @torch.inference_mode(False)
    def __init__(self, device: Any, domain_ids: Ints) -> None:
        """Begin without losses.

        Args:
            device: the torch device of the losses.
            domain_ids: domain of every sequence, -1 for padding; shape (B,).
        """
        self._device = torch.device(device)
        # Losses may be recorded, and the copy started, in several streams. All sums belong to the first one.
        self._stream = torch.cuda.current_stream(self._device) if self._is_cuda else None
        self._domains, index = np.unique(domain_ids, return_inverse=True)
        self._index = self._to_device(index.astype(np.int64))
        count = len(domain_ids)
        self._quanta = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._nats = torch.zeros(count, dtype=torch.float64, device=self._device)
        self._tokens = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._num_wrong = torch.zeros(1, dtype=torch.int64, device=self._device)
        """Sequences of which the trainer counted another number of tokens than the loss mask, or fewer than 0."""
        self._copy: HostCopy | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self, rows: Rows, losses: Tensor, mask: NDArray[np.bool_], counted: Ints | None, claimed: Any = None
    ) -> None:
        """Add losses in nats of some rows of the batch.

        Args:
            rows: the b rows.
            losses: on the device, or on another one, which costs a copy; shape (b, T), or (b, 1) for sums.
            mask: which of them count; shape of `losses`.
            counted: tokens of every row that count; shape (b,). None if only the trainer knows them.
            claimed: the same as the trainer counted them on a device; they are compared there.
        """
        losses = losses.to(self._device, non_blocking=self._is_cuda)
        claimed = None if claimed is None else claimed.to(self._device, non_blocking=self._is_cuda)
        if self._is_other_stream:
            # The current stream does not wait for the sums, and may use this memory again before they have read it.
            losses = losses.clone()
            claimed = None if claimed is None else claimed.clone()
        with self._in_order(losses, claimed):
            self._add(rows, losses, mask, counted, claimed)

    def _add(
        self, rows: Rows, losses: Tensor, mask: NDArray[np.bool_], counted: Ints | None, claimed: Tensor | None
    ) -> None:
        is_counted = self._to_device(mask)
        if counted is None:
            assert claimed is not None  # The caller gives one of them.
            num_tokens = torch.where(is_counted[:, 0], claimed.long(), 0)
            is_counted = (num_tokens > 0)[:, None]
            self._num_wrong += (num_tokens < 0).sum()
        else:
            num_tokens = self._to_device(counted)
            if claimed is not None:
                self._num_wrong += (claimed != num_tokens).sum()
        nats = torch.where(is_counted, losses.double(), 0.0)
        quanta = torch.where(nats.abs() < WRAP_LIMIT, nats, 0.0).mul_(QUANTA_PER_NAT).round_().long()
        where = rows if isinstance(rows, slice) else self._to_device(rows)
        # Rows are distinct, so that no two terms meet.
        self._quanta[where] += quanta.sum(dim=1)
        self._nats[where] += nats.sum(dim=1)
        self._tokens[where] += num_tokens
        self._copy = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def start_copy(self) -> None:
        """Sum by domain, and start the copy to the host behind everything that was recorded."""
        with self._in_order():
            self._copy = HostCopy(self._packed())

    def _packed(self) -> Tensor:
        """Return all sums in one tensor, so that one copy is enough; the bits of floats travel as integers."""
        is_finite = (self._nats.abs() < WRAP_LIMIT) & (self._quanta.abs() < MAX_QUANTA)
        # The same rounding as `quantise_losses`: a power of two, and half to even.
        rounded = (self._quanta.double() * (STATISTICS_QUANTA_PER_NAT / QUANTA_PER_NAT)).round().long()
        rows = torch.stack([rounded * is_finite, self._tokens * is_finite, torch.ones_like(rounded), ~is_finite])
        by_domain = torch.zeros((NUM_BUFFER_ROWS, len(self._domains)), dtype=torch.int64, device=self._device)
        by_domain.index_add_(1, self._index, rows)
        by_sequence = (self._quanta, self._nats.view(torch.int64), self._tokens)
        return torch.cat([self._num_wrong, by_domain.reshape(-1), *by_sequence])

    @property
    def has_arrived(self) -> bool:
        """True if the copy has ended; starts the copy if it was not started."""
        return self._started_copy().has_arrived

    def domain_sums(self, num_domains: int) -> Ints:
        """Return the sums of every domain, without padding; shape (NUM_BUFFER_ROWS, num_domains)."""
        by_domain, _ = self._on_host()
        is_real = self._domains >= 0
        sums = np.zeros((NUM_BUFFER_ROWS, num_domains), np.int64)
        sums[:, self._domains[is_real]] = by_domain[:, is_real]
        return sums

    def sequence_sums(self) -> tuple[SequenceSums, Ints]:
        """Return the sums of every sequence, and the number of its counted tokens; shape (B,) each."""
        _, (quanta, nats, num_tokens) = self._on_host()
        return SequenceSums(quanta, nats.view(np.float64)), num_tokens

    def _on_host(self) -> tuple[Ints, Ints]:
        """Return the sums by domain and by sequence; waits for the device.

        Raises:
            ValueError: the trainer counted other tokens than the loss mask.
        """
        copied = self._started_copy().array()
        num_wrong = int(copied[0])
        if num_wrong:
            raise ValueError(
                f"record() got num_tokens of {num_wrong} sequences of a step that differ from what their loss masks "
                "count, or are below 0.\n  Sum the losses where batch.loss_mask is true; of samples, count the tokens."
            )
        content = copied[1:]
        border = NUM_BUFFER_ROWS * len(self._domains)
        return content[:border].reshape(NUM_BUFFER_ROWS, -1), content[border:].reshape(3, -1)

    def _started_copy(self) -> HostCopy:
        if self._copy is None:
            self.start_copy()
        assert self._copy is not None  # Set above.
        return self._copy

    def _in_order(self, *inputs: Tensor | None) -> AbstractContextManager[Any]:
        """Return a context whose operations follow those of the current stream and all earlier ones of this object."""
        if self._stream is None:
            return nullcontext()
        if self._is_other_stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in inputs:
                if tensor is not None:
                    tensor.record_stream(self._stream)
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    @property
    def _is_other_stream(self) -> bool:
        """True if the current stream is not that of the sums."""
        return self._stream is not None and torch.cuda.current_stream(self._device) != self._stream

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._is_cuda:
            # Only a copy from pinned memory is asynchronous. torch keeps pinned memory and uses it again.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
