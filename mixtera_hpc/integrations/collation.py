"""The default way from a list of samples to one dict: numbers and arrays are stacked or padded, the rest is listed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["collate_samples"]


def collate_samples(samples: Sequence[Any]) -> dict[str, Any]:
    """Combine samples into one dict, with a leading dimension of one entry per sample.

    Each field whose values are numbers, arrays or tensors becomes one tensor: stacked if their shapes are equal; else
    padded with zeros at the end of the first dimension, with the true lengths in `{field}_lengths`, (B,) int64. Fields
    of other values, or of arrays whose other dimensions differ, become lists.

    Args:
        samples: dicts with the same keys. Others become the list `samples`.
    """
    if not all(isinstance(sample, dict) and sample.keys() == samples[0].keys() for sample in samples):
        return {"samples": list(samples)}
    fields: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        tensors = [_as_tensor(value) for value in values]
        if any(tensor is None for tensor in tensors):
            fields[name] = values
        else:
            fields |= _combine(name, [tensor for tensor in tensors if tensor is not None])
    return fields


def _as_tensor(value: Any) -> Tensor | None:
    """Return numbers, arrays of numbers and tensors as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float, np.generic)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # Arrays that read files may be read-only, which torch warns about.
        return torch.from_numpy(value if value.flags.writeable and value.ndim else value.copy())
    return None


def _combine(name: str, tensors: list[Tensor]) -> dict[str, Any]:
    """Stack or pad the values of one field; list them if neither is possible."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1 and len({tensor.dtype for tensor in tensors}) == 1:
        return {name: torch.stack(tensors)}
    # Only the first dimension may differ.
    if len({(tensor.ndim, tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1 and tensors[0].ndim:
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        return {name: pad_sequence(tensors, batch_first=True), f"{name}_lengths": lengths}
    return {name: list(tensors)}
