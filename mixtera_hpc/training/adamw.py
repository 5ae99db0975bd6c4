"""AdamW through the functional interface of torch.

The class `torch.optim.AdamW` imports the compiler of torch (`torch._dynamo`, and with it FSDP) at its first use, which
takes a second of CPU time and thousands of file accesses on every rank. The function that it calls does not. Updates
and the layout of the state are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["AdamW", "ParameterGroup"]

EPSILON = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that have the same weight decay. Their `.grad` must be set."""

    parameters: Sequence[Tensor]
    weight_decay: float


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) over some groups of parameters."""

    def __init__(self, groups: Sequence[ParameterGroup], *, betas: tuple[float, float], fused: bool) -> None:
        """Allocate two averages per parameter, on its device.

        Args:
            groups: all parameters that are updated.
            betas: decay of the averages of gradients and of their squares.
            fused: use the fused kernel, for parameters on a GPU.
        """
        self._groups = groups
        self._betas = betas
        self._fused = fused
        self._states = [[self._new_state(parameter) for parameter in group.parameters] for group in groups]

    def step(self, learning_rate: float) -> None:
        """Update the parameters from their gradients."""
        beta1, beta2 = self._betas
        with torch.no_grad():
            for group, states in zip(self._groups, self._states, strict=True):
                adamw(
                    list(group.parameters),
                    [_gradient(parameter) for parameter in group.parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    foreach=False,
                    fused=self._fused,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=learning_rate,
                    weight_decay=group.weight_decay,
                    eps=EPSILON,
                    maximize=False,
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the step of every parameter, laid out as `torch.optim.AdamW.state_dict` does."""
        states = [state for group in self._states for state in group]
        param_groups = []
        first = 0
        for group in self._groups:
            numbers = list(range(first, first + len(group.parameters)))
            param_groups.append({"weight_decay": group.weight_decay, "betas": self._betas, "params": numbers})
            first += len(numbers)
        return {"state": dict(enumerate(states)), "param_groups": param_groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters; tensors may be on another device."""
        number = 0
        for states in self._states:
            for state in states:
                # A state that was saved before the first step of `torch.optim.AdamW` is empty.
                for name, value in saved["state"].get(number, {}).items():
                    state[name].copy_(value)
                number += 1

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        # The fused kernel counts steps on the device.
        device = parameter.device if self._fused else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"A parameter of shape {tuple(parameter.shape)} has no gradient.")
    return parameter.grad
