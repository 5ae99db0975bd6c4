"""Micro-batches as Megatron expects them: names, shifted labels, positions and attention masks."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BatchFormat", "megatron_batch", "micro_batches_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFormat:
    """The content of a micro-batch; the fields have the names of Megatron-LM's arguments."""

    micro_batch_size: int
    """Sequences per micro-batch."""
    create_attention_mask_in_dataloader: bool = False
    """Yield `attention_mask`, bool (B, 1, T, T), True where attention is masked. Needs T² bytes per sequence."""
    reset_attention_mask: bool = False
    """Mask attention between documents as well."""
    reset_position_ids: bool = False
    """Count positions from the beginning of each document."""


def megatron_batch(batch: dict[str, Tensor], form: BatchFormat) -> dict[str, Tensor]:
    """Return B sequences, as `as_tensors` describes them, under Megatron's names.

    Returns:
        `tokens`, `labels` and `position_ids` int64 (B, T), `loss_mask` float32 (B, T), and `attention_mask` if `form`
        says so; also `step` and `positions`, which `DataPlane.record` uses.
    """
    tokens = batch["tokens"]
    documents = batch["document_ids"][:, :-1]
    converted = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": batch["loss_mask"].float(),
        "position_ids": _position_ids(documents, form.reset_position_ids),
        "step": batch["step"],
        "positions": batch["positions"],
    }
    if form.create_attention_mask_in_dataloader:
        converted["attention_mask"] = _attention_mask(documents, form.reset_attention_mask)
    return converted


def micro_batches_of(batch: dict[str, Tensor], form: BatchFormat) -> list[dict[str, Tensor]]:
    """Cut a batch into micro-batches, which all have its `step`."""
    size = form.micro_batch_size
    step = batch["step"]
    return [
        {name: values if values is step else values[start : start + size] for name, values in batch.items()}
        for start in range(0, len(batch["positions"]), size)
    ]


def _position_ids(documents: Tensor, resets: bool) -> Tensor:
    """Return the position of every token, in its document if `resets`, else in its sequence; int64 (B, T)."""
    positions = torch.arange(documents.shape[1]).expand(documents.shape)
    if not resets:
        return positions.contiguous()
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return positions - torch.where(is_first, positions, 0).cummax(dim=1).values


def _attention_mask(documents: Tensor, resets: bool) -> Tensor:
    """Return True where a token must not attend to another one: bool (B, 1, T, T)."""
    length = documents.shape[1]
    is_masked = torch.ones(length, length, dtype=torch.bool).triu(1).expand(len(documents), length, length)
    if resets:
        is_masked = is_masked | (documents[:, :, None] != documents[:, None, :])
    return is_masked[:, None].contiguous()
