"""Per-token losses → per-sequence sums, wherever the losses are → this rank's part of a step's statistics.

Arrays and CPU tensors are summed in float64 at once. Losses on an accelerator are summed there, and the sums are copied
without waiting. The copy is read when the step is closed, one step later, so that the trainer's stream never stalls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, accumulate_losses
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import CommError

__all__ = ["StepLosses", "sequence_sums"]

Sums = NDArray[np.float64]


class StepLosses:
    """The losses that one rank has recorded for the current step."""

    def __init__(self, num_domains: int) -> None:
        """Begin without losses."""
        self._num_domains = num_domains
        self._recorded: list[tuple[slice, Callable[[], Sums]]] = []

    def add(self, batch: Batch, loss_per_token: Any, rows: slice) -> None:
        """Add the losses of some sequences of `batch`; see `DataPlane.record`."""
        # Only sums are kept: the losses of a step would be B x T numbers.
        self._recorded.append((rows, sequence_sums(loss_per_token, batch.loss_mask[rows])))

    def take(self, batch: Batch) -> NDArray[np.int64]:
        """Return the sums over the losses of `batch`, and forget them; shape (NUM_BUFFER_ROWS, K).

        Raises:
            CommError: some sequences were recorded, but not every sequence exactly once.
        """
        recorded = self._recorded
        self._recorded = []
        total = np.zeros((NUM_BUFFER_ROWS, self._num_domains), np.int64)
        times_recorded = np.zeros(len(batch.domain_ids), np.int64)
        for rows, sums in recorded:
            times_recorded[rows] += 1
            num_tokens = batch.loss_mask[rows].sum(axis=1)
            total += accumulate_losses(batch.domain_ids[rows], sums(), num_tokens, self._num_domains)

        if recorded and (times_recorded != 1).any():
            wrong = int(np.argmax(times_recorded != 1))
            raise CommError(
                f"Sequence {batch.positions[wrong]} of step {batch.step} was recorded {times_recorded[wrong]} times.\n"
                "  Call record() once for every micro-batch, with its rows."
            )
        return total


def sequence_sums(loss_per_token: Any, mask: NDArray[np.bool_]) -> Callable[[], Sums]:
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
