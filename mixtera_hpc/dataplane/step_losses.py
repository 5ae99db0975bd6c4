"""Per-token losses → per-sequence sums, wherever the losses are → what this rank says of a step.

Arrays and CPU tensors are summed in float64 on the spot. Losses on an accelerator are summed there and copied without
waiting; the copy is looked at when the step is closed, one step later, so the trainer's stream never stalls.
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
    """What one rank has recorded of the step that is being trained on."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._recorded: list[tuple[slice, Callable[[], Sums]]] = []

    def add(self, batch: Batch, loss_per_token: Any, rows: slice) -> None:
        """Take the losses of some sequences of `batch`; see `DataPlane.record`."""
        self._recorded.append((rows, sequence_sums(loss_per_token, batch.loss_mask[rows])))

    def take(self, batch: Batch) -> NDArray[np.int64]:
        """The sums over all that was added, all of `batch` or nothing; shape (NUM_ROWS, num_domains). Begins anew.

        Raises:
            CommError: a sequence was added twice, or left out.
        """
        recorded, self._recorded = self._recorded, []
        total = np.zeros((NUM_BUFFER_ROWS, self._num_domains), np.int64)
        times = np.zeros(len(batch.domain_ids), np.int64)
        for rows, sums in recorded:
            times[rows] += 1
            counted = batch.loss_mask[rows].sum(axis=1)
            total += accumulate_losses(batch.domain_ids[rows], sums(), counted, self._num_domains)
        if recorded and (times != 1).any():
            odd = int(np.argmax(times != 1))
            raise CommError(
                f"Sequence {batch.positions[odd]} of step {batch.step} was recorded {times[odd]} times: call record() once for "
                "every micro-batch, with its rows."
            )
        return total


def sequence_sums(loss_per_token: Any, mask: NDArray[np.bool_]) -> Callable[[], Sums]:
    """Sum the counted losses of every sequence; nats, shape (B,).

    Args:
        loss_per_token: array or torch tensor of shape (B, T), on any device.
        mask: which tokens count; shape (B, T).

    Returns:
        A function that gives the sums, waiting for the accelerator if it has to.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(loss_per_token.shape) != mask.shape:
        raise ValueError(
            f"record() was given losses of shape {tuple(loss_per_token.shape)}, the batch has {mask.shape}: one loss per "
            "predicted token, cross-entropy with reduction='none'."
        )
    if getattr(getattr(loss_per_token, "device", None), "type", "cpu") != "cpu":
        return _on_device(loss_per_token.detach(), mask)
    losses = (
        loss_per_token.detach().float().numpy() if hasattr(loss_per_token, "detach") else np.asarray(loss_per_token)
    )
    sums = np.where(mask, losses, 0).sum(axis=1, dtype=np.float64)
    return lambda: sums


def _on_device(losses: Any, mask: NDArray[np.bool_]) -> Callable[[], Sums]:
    import torch

    counted = torch.from_numpy(mask).pin_memory().to(losses.device, non_blocking=True)
    sums = torch.where(counted, losses.double(), 0.0).sum(dim=1)
    host = torch.empty(sums.shape, dtype=torch.float64, pin_memory=True)
    host.copy_(sums, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(losses.device))

    def result() -> Sums:
        arrived.synchronize()
        return host.numpy()

    return result
