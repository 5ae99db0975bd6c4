"""Data parallelism of the reference trainer: a torch process group and one all-reduce of all gradients per step.

The trainer does not use DDP. The loss is a mean over the counted tokens of the global batch, and that count is known
only after the last micro-batch of every rank. DDP divides by the number of ranks and would need the count in advance.
Here each rank sums gradients in one flat buffer whose last element is its token count, so a single all-reduce delivers
both.

Price: the all-reduce starts after the backward pass instead of overlapping with it. That is acceptable for a model that
fits on one GPU and a trainer whose purpose is to exercise the data plane.
"""

import torch
from torch import Tensor, nn

from mixtera_hpc.integrations.process_group import Replicas

__all__ = ["GradientBuffer"]


class GradientBuffer:
    """All gradients of a model in one flat float32 buffer, followed by the number of tokens they are summed over.

    The `.grad` of every parameter is a view into the buffer, so nothing is copied before or after the all-reduce.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        num_gradients = sum(parameter.numel() for parameter in parameters)
        self._buffer = torch.zeros(num_gradients + 1, dtype=torch.float32, device=parameters[0].device)
        self._gradients = self._buffer[:num_gradients]
        self._num_tokens = self._buffer[num_gradients:]

        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad = self._gradients[start:end].view_as(parameter)
            start = end

    def zero(self) -> None:
        """Reset gradients and token count at the beginning of a step."""
        self._buffer.zero_()

    def backward(self, loss: Tensor, counted: Tensor) -> None:
        """Add the gradient of the summed loss of all counted tokens.

        Args:
            loss: loss of every token, float (B, T).
            counted: whether the loss of a token counts, bool (B, T).
        """
        loss_sum = loss.masked_fill(~counted, 0.0).sum()
        torch.autograd.backward(loss_sum)
        self._num_tokens += counted.sum()

    def average(self, replicas: Replicas) -> None:
        """Replace the sums of this rank by the mean over all counted tokens of the global batch. **Collective.**"""
        replicas.all_reduce(self._buffer)
        self._gradients /= self._num_tokens.clamp(min=1)

    def clip(self, max_norm: float) -> None:
        """Scale the gradients to a Euclidean norm of at most `max_norm` without waiting for the device."""
        scale = max_norm / (self._gradients.norm() + 1e-6)
        self._gradients *= scale.clamp(max=1)
