"""Per-token losses → per-sequence sums, wherever the losses are → this rank's part of a step's statistics.

Arrays and CPU tensors are summed in float64 at once. Losses on an accelerator are summed there, and the sums are copied
without waiting. The copy is read when the step is closed, one step later, so that the trainer's stream never stalls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import accumulate_losses
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import CommError

__all__ = ["StepLosses"]

Sums = NDArray[np.float64]

Rows = slice | NDArray[np.int64]
"""Which rows of a batch."""


class StepLosses:
    """The losses that one rank has recorded for one step."""

    def __init__(self, batch: Batch, num_domains: int) -> None:
        """Begin without losses."""
        # Not the batch itself: its tokens would stay in memory until the step is reduced.
        self._step = batch.step
        self._positions = batch.positions
        self._domain_ids = batch.domain_ids
        self._loss_mask = batch.loss_mask
        self._num_domains = num_domains
        self._recorded: list[tuple[Rows, NDArray[np.int64], Callable[[], Sums]]] = []
        """Rows, number of counted tokens of each row, and their losses."""
        # One column stands for the whole sequence where a batch has no tokens.
        self._is_recorded = np.zeros((len(batch.domain_ids), max(batch.loss_mask.shape[1], 1)), np.bool_)
        self.are_complete = False
        """Whether every token of every sequence was recorded."""

    @property
    def has_losses(self) -> bool:
        """Whether anything was recorded."""
        return bool(self._recorded)

    def rows_at(self, positions: Any, rows: slice) -> Rows:
        """Return `rows` of the part of the batch that has `positions`, as rows of the whole batch.

        Args:
            positions: array or torch tensor on any device; None for the whole batch.

        Raises:
            ValueError: they are not positions of this batch, or occur twice.
        """
        if positions is None or positions is self._positions:
            return rows
        held = _on_host(positions).astype(np.int64)
        indices = np.searchsorted(self._positions, held)
        is_known = np.take(self._positions, indices, mode="clip") == held
        if not is_known.all() or len(np.unique(held)) != len(held):
            raise ValueError(
                f"record() was given the positions {held.tolist()} of step {self._step}, but this rank has "
                f"{self._positions[0]} to {self._positions[-1]}, each once."
            )
        return indices[rows]

    def add(self, loss: Any, rows: Rows, tokens: slice | None, num_tokens: Any) -> None:
        """Add the losses of some sequences; see `DataPlane.record`.

        Raises:
            CommError: some of these tokens were recorded before.
            ValueError: the losses have another shape, or `num_tokens` differs from the loss mask.
        """
        columns = slice(None) if tokens is None else tokens
        mask = self._loss_mask[rows, columns]
        counted = mask.sum(axis=1)
        # Only sums are kept: the losses of a step would be B x T numbers.
        sums = _sequence_sums(loss, mask) if num_tokens is None else _given_sums(loss, num_tokens, counted)

        recorded_before = self._is_recorded[rows, columns].any(axis=1)
        if recorded_before.any():
            position = self._positions[rows][int(np.argmax(recorded_before))]
            raise CommError(
                f"Sequence {position} of step {self._step} was recorded 2 times.\n"
                "  Call record() once for every micro-batch, with its rows."
            )
        self._is_recorded[rows, columns] = True
        self.are_complete = bool(self._is_recorded.all())
        self._recorded.append((rows, counted, sums))

    def total(self) -> NDArray[np.int64]:
        """Return the sums over the losses of a finished step; shape (NUM_BUFFER_ROWS, K).

        Raises:
            CommError: some of its tokens were recorded, but not all.
        """
        if self._recorded and not self.are_complete:
            is_missing = ~self._is_recorded.all(axis=1)
            raise CommError(
                f"Step {self._step} was finished, but only a part of it was recorded: sequence "
                f"{self._positions[int(np.argmax(is_missing))]} was recorded 0 times, or not with all its tokens.\n"
                "  Call record() once for every micro-batch, with its rows, before the step is finished."
            )
        # Parts of one sequence are added before its loss is rounded, as if it had been recorded at once.
        losses = np.zeros(len(self._domain_ids))
        num_tokens = np.zeros(len(self._domain_ids), np.int64)
        for rows, counted, sums in self._recorded:
            losses[rows] += sums()
            num_tokens[rows] += counted
        recorded = slice(None) if self._recorded else slice(0, 0)
        return accumulate_losses(self._domain_ids[recorded], losses[recorded], num_tokens[recorded], self._num_domains)


def _given_sums(loss: Any, num_tokens: Any, expected: NDArray[np.int64]) -> Callable[[], Sums]:
    """Take sums that the trainer computed, one per sequence; `expected` is the number of tokens each one covers."""
    counted = _on_host(num_tokens).astype(np.int64)
    if counted.shape != expected.shape or tuple(loss.shape) != expected.shape:
        raise ValueError(
            f"record() got num_tokens of shape {counted.shape} and losses of shape {tuple(loss.shape)}, but with "
            f"num_tokens both are one number per sequence: {expected.shape}."
        )
    if (counted != expected).any():
        row = int(np.argmax(counted != expected))
        raise ValueError(
            f"record() got num_tokens={counted[row]} for row {row}, but its loss mask counts {expected[row]} tokens.\n"
            "  Sum the losses where batch.loss_mask is true."
        )
    device = getattr(loss, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        # One column per sequence, all counted: copied without waiting, as losses per token are.
        return _sums_on_device(loss.detach().reshape(-1, 1), np.ones((len(expected), 1), np.bool_))
    sums = _on_host(loss)
    return lambda: sums


def _on_host(values: Any) -> Sums:
    """Return an array or a tensor on any device as an array of float64."""
    if hasattr(values, "detach"):
        # NumPy has no bfloat16.
        return np.asarray(values.detach().double().cpu().numpy())
    return np.array(values, np.float64)


def _sequence_sums(loss_per_token: Any, mask: NDArray[np.bool_]) -> Callable[[], Sums]:
    """Sum the counted losses of every sequence; nats, shape (B,).

    Args:
        loss_per_token: array or torch tensor of shape (B, T), on any device.
        mask: which tokens count; shape (B, T).

    Returns:
        A function that returns the sums, and waits for the accelerator if it has to.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(loss_per_token.shape) != mask.shape:
        raise ValueError(
            f"record() got losses of shape {tuple(loss_per_token.shape)}, but the batch has {mask.shape}.\n"
            "  Give one loss per predicted token: cross-entropy with reduction='none'."
        )
    device = getattr(loss_per_token, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        return _sums_on_device(loss_per_token.detach(), mask)
    if hasattr(loss_per_token, "detach"):
        losses = loss_per_token.detach().float().numpy()
    else:
        losses = np.asarray(loss_per_token)
    # Not `losses * mask`: a masked loss may be infinite or NaN.
    sums = np.where(mask, losses, 0).sum(axis=1, dtype=np.float64)
    return lambda: sums


def _sums_on_device(losses: Any, mask: NDArray[np.bool_]) -> Callable[[], Sums]:
    """Sum on the accelerator and start the copy to pinned memory; only the returned function waits."""
    import torch  # Heavy and optional; a caller with losses on an accelerator has imported it.

    counted = torch.from_numpy(mask).pin_memory().to(losses.device, non_blocking=True)
    sums = torch.where(counted, losses.double(), 0.0).sum(dim=1)
    host = torch.empty(sums.shape, dtype=torch.float64, pin_memory=True)
    host.copy_(sums, non_blocking=True)
    # The event marks the end of the copy in the trainer's stream.
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(losses.device))

    def result() -> Sums:
        arrived.synchronize()
        return host.numpy()

    return result
