"""The losses of the tokens of a batch, computed on the device of the model."""

from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtera_hpc.dataplane.plane import Batch
from mixtera_hpc.integrations.device_staging import DeviceStage
from mixtera_hpc.training.model import GPT

__all__ = ["DeviceBatch", "batch_loss", "stage_batch"]


class DeviceBatch(NamedTuple):
    """The arrays of a batch on the device."""

    tokens: Tensor
    loss_mask: Tensor
    documents: tuple[Tensor, Tensor] | None
    """`document_ids` and `position_ids` if tokens attend to their own document only; else None."""
    loss_weights: Tensor | None
    """Factor on the loss of each sequence; None for 1."""


def stage_batch(stage: DeviceStage, batch: Batch, attention: Literal["sequence", "document"]) -> DeviceBatch:
    """Copy what a model needs of a batch to the device, without waiting for the copy.

    Args:
        attention: `training.attention`.
    """
    arrays: list[NDArray[Any]] = [batch.tokens, batch.loss_mask]
    if attention == "document":
        arrays += [batch.document_ids, batch.position_ids]
    if batch.loss_weights is not None:
        arrays.append(batch.loss_weights)
    tokens, loss_mask, *others = stage.copy(*arrays)
    loss_weights = others.pop() if batch.loss_weights is not None else None
    documents = (others[0], others[1]) if attention == "document" else None
    return DeviceBatch(tokens, loss_mask, documents, loss_weights)


def batch_loss(model: GPT, batch: DeviceBatch, rows: slice) -> Tensor:
    """Return the loss of every predicted token of some sequences of a batch, in nats; float32 (rows, T)."""
    documents = batch.documents
    if documents is not None:
        documents = documents[0][rows], documents[1][rows]
    device = batch.tokens.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss: Tensor = model(batch.tokens[rows], documents)
    return loss
