"""The trace format: the losses of every domain in every step, as the arrays of one npz file.

T steps, K domains, V validations.

    names       (K,)    text            domains
    mu          (K,)    float64         initial mixture, sum 1; a domain of 0 stays at 0
    counts      (T, K)  integer         sequences of each step
    loss_mean   (T, K)  float64         mean token loss in nats; NaN where a domain had no counted tokens
    B           ()      integer         sequences of a global batch
    seq_len     ()      integer         counted tokens of a sequence, where `tokens` is missing
    tokens      (T, K)  integer         optional: counted tokens
    weights     (T, K)  float64         optional: the mixture that each step was served with
    held_out_step    (V,)    integer    optional: steps finished before each validation
    held_out_loss    (V, K)  float64    optional: held-out loss, NaN where a domain has none
    held_out_tokens  (V, K)  integer    optional: counted tokens of it
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import DomainStatistics, dequantise_losses, quantise_losses
from mixtera_hpc.errors import DataError

__all__ = ["LossTrace"]

EXACT_NATS = float(2**28)
"""Sums of losses below this are whole multiples of 2^-24 nats, which a mean and a count determine."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossTrace:
    """The losses of a run; shapes as in the module's table."""

    names: tuple[str, ...]
    prior: NDArray[np.float64]
    num_sequences: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    loss_mean: NDArray[np.float64]
    global_batch_size: int
    seq_len: int
    weights: NDArray[np.float64] | None = None
    held_out_step: NDArray[np.int64]
    held_out_loss: NDArray[np.float64]
    held_out_tokens: NDArray[np.int64]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], place: str) -> "LossTrace":
        """Return the trace of an npz file.

        Args:
            arrays: by name.
            place: the file, for messages.

        Raises:
            DataError: an array is missing, or its shape does not fit the others.
        """
        for name in ("names", "mu", "counts", "loss_mean", "B", "seq_len"):
            if name not in arrays:
                raise DataError(
                    f"{place} has no array {name!r}, so it is not a trace of losses; it has {', '.join(arrays)}.\n"
                    "  Write one with mixtera-hpc mixture export RUN --out FILE.npz."
                )
        counts = np.asarray(arrays["counts"], np.int64)
        num_domains = counts.shape[1] if counts.ndim == 2 else 0
        none = np.zeros((0, num_domains))
        trace = cls(
            names=tuple(str(name) for name in arrays["names"]),
            prior=np.asarray(arrays["mu"], np.float64),
            num_sequences=counts,
            num_tokens=np.asarray(arrays.get("tokens", counts * int(arrays["seq_len"])), np.int64),
            loss_mean=np.asarray(arrays["loss_mean"], np.float64),
            global_batch_size=int(arrays["B"]),
            seq_len=int(arrays["seq_len"]),
            weights=np.asarray(arrays["weights"], np.float64) if "weights" in arrays else None,
            held_out_step=np.asarray(arrays.get("held_out_step", np.zeros(0)), np.int64),
            held_out_loss=np.asarray(arrays.get("held_out_loss", none), np.float64),
            held_out_tokens=np.asarray(arrays.get("held_out_tokens", none), np.int64),
        )
        trace.check(place)
        return trace

    def check(self, place: str) -> None:
        """Raise DataError if the shapes do not fit each other, or the initial mixture is no distribution."""
        size = len(self.names)
        steps = (len(self.num_sequences), size)
        checks = (len(self.held_out_step), size)
        shapes = {
            "mu": (self.prior.shape, (size,)),
            "counts": (self.num_sequences.shape, steps),
            "loss_mean": (self.loss_mean.shape, steps),
            "tokens": (self.num_tokens.shape, steps),
            "weights": (steps if self.weights is None else self.weights.shape, steps),
            "held_out_loss": (self.held_out_loss.shape, checks),
            "held_out_tokens": (self.held_out_tokens.shape, checks),
        }
        for name, (shape, expected) in shapes.items():
            if shape != expected:
                raise DataError(f"{place}: {name} has shape {shape}, expected {expected} for {size} names.")
        if not (np.isfinite(self.prior).all() and (self.prior >= 0).all() and abs(self.prior.sum() - 1) <= 1e-6):
            raise DataError(f"{place}: mu is {self.prior}, expected weights of at least 0 and sum 1.")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of an npz file."""
        held_out = {name: getattr(self, name) for name in ("held_out_step", "held_out_loss", "held_out_tokens")}
        return {
            "names": np.array(self.names),
            "mu": self.prior,
            "counts": self.num_sequences,
            "loss_mean": self.loss_mean,
            "B": np.array(self.global_batch_size),
            "seq_len": np.array(self.seq_len),
            "tokens": self.num_tokens,
            **({} if self.weights is None else {"weights": self.weights}),
            **(held_out if len(self.held_out_step) else {}),
        }

    def steps(self) -> Iterator[DomainStatistics]:
        """Yield the statistics of every step."""
        for step, (sequences, tokens, loss) in enumerate(
            zip(self.num_sequences, self.num_tokens, self.loss_mean, strict=True)
        ):
            weights = None if self.weights is None else self.weights[step]
            yield _statistics(step, sequences, tokens, loss, weights)

    def validations(self) -> Iterator[DomainStatistics]:
        """Yield the statistics of every validation; `step` is the number of steps before it."""
        sequences = -(-self.held_out_tokens // max(self.seq_len, 1))
        for step, count, tokens, loss in zip(
            self.held_out_step.tolist(), sequences, self.held_out_tokens, self.held_out_loss, strict=True
        ):
            yield _statistics(step, count, tokens, loss, None)


def _statistics(
    step: int,
    sequences: NDArray[np.int64],
    tokens: NDArray[np.int64],
    loss: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
) -> DomainStatistics:
    counted = np.where(np.isfinite(loss), tokens, 0)
    loss_sum = np.where(counted > 0, loss, 0.0) * counted
    # Recorded sums are multiples of 2^-24 nats. Rounding restores them from the mean, bit for bit.
    exact = dequantise_losses(quantise_losses(loss_sum))
    loss_sum = np.where((np.abs(loss_sum) < EXACT_NATS) & (np.abs(exact - loss_sum) < 1e-9), exact, loss_sum)
    return DomainStatistics(
        step=step,
        loss_sum=loss_sum,
        num_tokens=counted,
        num_sequences=sequences,
        num_nonfinite=np.zeros_like(sequences),
        weights=weights,
    )
