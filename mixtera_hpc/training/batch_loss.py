"""From a batch on the host to the losses of its tokens, on the device of the model."""

from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtera_hpc.dataplane.plane import Batch
from mixtera_hpc.training.model import GPT

__all__ = ["batch_loss", "to_device"]


def batch_loss(
    model: GPT, batch: Batch, rows: slice, attention: Literal["sequence", "document"], device: torch.device
) -> Tensor:
    """Return the loss of every predicted token of some sequences of a batch, in nats; float32 (rows, T).

    Args:
        attention: `training.attention`.
        device: of the model.
    """
    tokens = to_device(batch.tokens[rows], device)
    documents: tuple[Tensor, Tensor] | None = None
    if attention == "document":
        documents = to_device(batch.document_ids[rows], device), to_device(batch.position_ids[rows], device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss: Tensor = model(tokens, documents)
    return loss


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for the copy to finish."""
    tensor = torch.tensor(array)
    if device.type == "cuda":
        # Only a copy from pinned memory is asynchronous.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
