"""Losses in nats → exact integer sums per sequence, and the units that they are counted in.

The loss of each token is rounded to a multiple of 2^-38 nats and added as int64. So sums do not depend on the order of
the terms, on the device, or on how a sequence is cut into parts. Price: one more pass over the losses, and an error of
at most 2^-39 nats per token (2e-12). Float32 losses of at least 2^-15 nats are such multiples already.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import MAX_SEQUENCE_LOSS

__all__ = [
    "MAX_QUANTA",
    "QUANTA_PER_NAT",
    "WRAP_LIMIT",
    "Ints",
    "Rows",
    "SequenceSums",
    "is_on_cuda",
    "on_host",
    "sums_on_host",
]

QUANTA_PER_NAT = float(2**38)
"""Units of a rounded token loss in one nat. `MAX_SEQUENCE_LOSS` is 2^62 of them, so sums below it fit into an int64."""

MAX_QUANTA = int(MAX_SEQUENCE_LOSS * QUANTA_PER_NAT)

WRAP_LIMIT = 1.5 * MAX_SEQUENCE_LOSS
"""In nats. Sums in float64 are not exact, but show reliably which integer sums are beyond 2^63 and wrap around."""

Sums = NDArray[np.float64]
Ints = NDArray[np.int64]


class SequenceSums(NamedTuple):
    """Losses of sequences, summed over their counted tokens; shape (B,) each."""

    quanta: Ints
    """Exact, in units of 2^-38 nats; meaningless where the sum is not finite."""
    nats: Sums
    """Sums of losses in nats, not exact; NaN or infinite where a token's loss is."""

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Mask of the sums below `MAX_SEQUENCE_LOSS`; shape (B,)."""
        # NaN compares false.
        return (np.abs(self.nats) < WRAP_LIMIT) & (np.abs(self.quanta) < MAX_QUANTA)


Rows = slice | NDArray[np.int64]
"""Rows of a batch."""


def is_on_cuda(values: Any) -> bool:
    """Return whether `values` is a torch tensor on a CUDA or ROCm device, which copies without waiting."""
    return getattr(getattr(values, "device", None), "type", None) == "cuda" and hasattr(values, "detach")


def on_host(values: Any) -> Sums:
    """Return an array or a tensor on any device as an array of float64."""
    if hasattr(values, "detach"):
        # NumPy has no bfloat16, and some accelerators have no float64.
        return np.asarray(values.detach().cpu().double().numpy())
    return np.array(values, np.float64)


def sums_on_host(losses: NDArray[Any]) -> SequenceSums:
    """Sum losses in nats of shape (B, T); tokens that do not count are 0."""
    nats = losses.sum(axis=1, dtype=np.float64)
    # Only losses that are finite have integers; of other sequences the sum in nats says what they are.
    if not (np.abs(nats) < WRAP_LIMIT).all():
        losses = np.where(np.abs(losses) < WRAP_LIMIT, losses, 0)
    quanta = losses * QUANTA_PER_NAT if losses.dtype == np.float64 else losses.astype(np.float64) * QUANTA_PER_NAT
    return SequenceSums(np.rint(quanta, out=quanta).astype(np.int64).sum(axis=1), nats)
