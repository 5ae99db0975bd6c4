"""`PerTokenCrossEntropy`: a loss of torchtitan that keeps the loss of every token, for `integrations.torchtitan`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import (
    IGNORE_INDEX,
    ChunkedLossWrapper,
    CrossEntropyLoss,
    _LossParallelCrossEntropy,
)
from torchtitan.config import CompileConfig, ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend

from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError

__all__ = [
    "PerTokenCrossEntropy",
    "TokenLosses",
    "context_parallel_slices",
    "innermost_loss",
    "record_losses",
    "token_slices",
]


class PerTokenCrossEntropy(CrossEntropyLoss):
    """torchtitan's cross-entropy, which also keeps the loss of every token for the statistics of the domains.

    It can be the `loss_fn` of a `ChunkedLossWrapper`. Price: one copy of B x T losses per micro-batch.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """The options of torchtitan's `CrossEntropyLoss`."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        super().__init__(config)
        self.fn = _losses_per_token
        self._maybe_compile(compile_config)
        self.training = TokenLosses()
        self.validation = TokenLosses()

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, divided by `global_valid_tokens` if given, and no metrics."""
        losses = self.fn(pred, labels, global_vocab_size=self.global_vocab_size)
        kept = self.training if torch.is_grad_enabled() else self.validation
        kept.add(losses.detach().view(labels.shape))
        loss = losses.sum()
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class TokenLosses:
    """The losses per token of the newest micro-batches, in tensors that stay where they are.

    A CUDA graph replays the copies into these tensors without calling `add` again.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        """One for every call of the loss function."""
        self._num_added = 0

    def start(self) -> None:
        """Expect the parts of new micro-batches."""
        self._num_added = 0

    def add(self, losses: Tensor) -> None:
        """Keep a copy of the losses of a part of a micro-batch; shape (B, any)."""
        if self._num_added == 0:
            self._parts = [part for part in self._parts if part.shape == losses.shape]
        if self._num_added == len(self._parts):
            self._parts.append(torch.empty_like(losses))
        self._parts[self._num_added].copy_(losses)
        self._num_added += 1

    def micro_batches(self, count: int) -> list[Tensor]:
        """Return the losses of `count` micro-batches; shape (B, T) each."""
        if self._num_added:
            del self._parts[self._num_added :]
        # A chunked loss calls the loss function for one part of every sequence after the other.
        num_parts = len(self._parts) // count
        firsts = range(0, num_parts * count, num_parts)
        return [torch.cat(self._parts[first : first + num_parts], dim=1) for first in firsts]


def innermost_loss(loss: Any) -> Any:
    """Return the loss, or its configuration, that `ChunkedLossWrapper` may wrap."""
    return loss.loss_fn if isinstance(loss, ChunkedLossWrapper | ChunkedLossWrapper.Config) else loss


def _losses_per_token(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """Return the cross-entropy of every token in nats, 0 where the label is `IGNORE_INDEX`; shape (B x T,).

    Args:
        pred: logits of shape (B, T, V), or with tensor parallelism this rank's part of the vocabulary.
        labels: shape (B, T).
        global_vocab_size: size of the whole vocabulary, needed with tensor parallelism and `spmd_types`.
    """
    group = None
    if isinstance(pred, DTensor):
        if pred.placements != (Shard(pred.ndim - 1),):
            raise ConfigError(
                f"PerTokenCrossEntropy got logits with the placements {pred.placements}.\n"
                "  Set parallelism.spmd_backend to spmd_types or partial_dtensor."
            )
        group, global_vocab_size, pred = pred.device_mesh.get_group("tp"), pred.shape[-1], pred.to_local()
    elif get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        group = current_spmd_mesh().get_group("tp")
    logits = pred.flatten(0, 1).float()
    if group is not None:
        losses: Tensor = _LossParallelCrossEntropy.apply(logits, labels.flatten(), group, global_vocab_size, "none")
        return losses
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)


def token_slices(parallelism: ParallelismConfig, parallel_dims: ParallelDims, seq_len: int) -> list[slice]:
    """Return which tokens of every sequence this rank computes losses of, in the order in which it has them."""
    mesh = parallel_dims.get_optional_mesh("cp")
    if mesh is None:
        return [slice(0, seq_len)]
    is_balanced = parallelism.context_parallel_load_balancer == "headtail"
    return context_parallel_slices(mesh.get_local_rank(), mesh.size(), seq_len, is_balanced)


def context_parallel_slices(rank: int, size: int, seq_len: int, is_balanced: bool) -> list[slice]:
    """Return which tokens a context-parallel rank has, in its order.

    Args:
        rank: in [0, size).
        size: ranks that share every sequence.
        seq_len: tokens of a sequence.
        is_balanced: the ranks get a part of the first and of the last tokens, whose attention costs less and more.
    """
    parts = [rank, 2 * size - 1 - rank] if is_balanced else [rank]
    length = seq_len // (size * len(parts))
    return [slice(part * length, (part + 1) * length) for part in parts]


def record_losses(
    target: DataPlane | HeldOutBatches, batch: Mapping[str, Any], losses: Tensor, token_slices: Sequence[slice]
) -> None:
    """Record the losses of the given tokens of every sequence of a micro-batch."""
    sizes = [tokens.stop - tokens.start for tokens in token_slices]
    for tokens, part in zip(token_slices, losses.split(sizes, dim=1), strict=True):
        target.record(batch, part, tokens=tokens)
