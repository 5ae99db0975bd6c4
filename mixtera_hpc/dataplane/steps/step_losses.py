"""Per-token losses → per-sequence sums, wherever the losses are → this rank's part of a step's statistics.

Arrays and CPU tensors are summed in float64 at once. Losses on an accelerator are summed there, and the sums are copied
without waiting. The copy is read when the step is closed, one step later, so that the trainer's stream never stalls.

The loss of each token is rounded to a multiple of 2^-38 nats and added as int64. So sums do not depend on the order of
the terms, on the device, or on how a sequence is cut into parts. Price: one more pass over the losses, and an error of
at most 2^-39 nats per token (2e-12). Float32 losses of at least 2^-15 nats are such multiples already.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import MAX_SEQUENCE_LOSS, NUM_BUFFER_ROWS, accumulate_losses
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import CommError

__all__ = ["MAX_QUANTA", "SequenceSums", "StepLosses", "means_of"]

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
    """Not exact; NaN or infinite where a token's loss is."""

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Mask of the sums below `MAX_SEQUENCE_LOSS`; shape (B,)."""
        # NaN compares false.
        return (np.abs(self.nats) < WRAP_LIMIT) & (np.abs(self.quanta) < MAX_QUANTA)


Rows = slice | NDArray[np.int64]
"""Rows of a batch."""


class StepLosses:
    """The losses that one rank has recorded for one step."""

    def __init__(self, batch: Batch, num_domains: int, num_parts: int = 1) -> None:
        """Begin without losses.

        Args:
            batch: what the losses will belong to.
            num_domains: K.
            num_parts: into how many parts the ranks of a group cut every sequence; this rank records one of them.
        """
        # Not the batch itself: its tokens would stay in memory until the step is reduced.
        self._step = batch.step
        self._positions = batch.positions
        self._domain_ids = batch.domain_ids
        self._is_real = ~batch.is_padding
        self._has_samples = batch.payloads is not None
        # A sample has one loss.
        self._loss_mask: NDArray[np.bool_] = self._is_real[:, None] if self._has_samples else batch.loss_mask
        self.num_domains = num_domains
        self._num_parts = num_parts
        self._recorded: list[tuple[Rows, Ints, Callable[[], SequenceSums]]] = []
        """Rows, number of counted tokens of each row, and their losses."""
        self._is_recorded: NDArray[np.bool_] = np.zeros(self._loss_mask.shape, np.bool_)
        self.are_complete = False
        """True if every token of every sequence was recorded; with several parts, a part of every sequence."""

    @property
    def has_losses(self) -> bool:
        """True if anything was recorded."""
        return bool(self._recorded)

    def rows_at(self, positions: Any, rows: slice) -> Rows:
        """Return `rows` of the part of the batch that has `positions`, as rows of the whole batch.

        Args:
            positions: array or torch tensor on any device; None for the whole batch.

        Raises:
            ValueError: they are not positions of this batch, or occur twice.
        """
        if positions is None or positions is self._positions:
            return rows
        held = _on_host(positions).astype(np.int64)
        indices = np.searchsorted(self._positions, held)
        is_known = np.take(self._positions, indices, mode="clip") == held
        if not is_known.all() or len(np.unique(held)) != len(held):
            raise ValueError(
                f"record() was given the positions {held.tolist()} of step {self._step}, but this rank has "
                f"{self._positions[0]} to {self._positions[-1]}, each once."
            )
        return indices[rows]

    def add(self, loss: Any, rows: Rows, tokens: slice | None, num_tokens: Any) -> None:
        """Add the losses of some sequences; see `DataPlane.record`.

        Raises:
            CommError: some of these tokens were recorded before.
            ValueError: the losses have another shape, or `num_tokens` differs from the loss mask.
        """
        columns = slice(None) if tokens is None else tokens
        mask = self._loss_mask[rows, columns]
        counted = mask.sum(axis=1)
        # Only sums are kept: the losses of a step would be B x T numbers.
        if self._has_samples:
            counted, sums = _sample_losses(loss, num_tokens, mask[:, 0], tokens)
        elif num_tokens is None:
            sums = _sequence_sums(loss, mask)
        else:
            sums = _given_sums(loss, num_tokens, counted)

        recorded_before = self._is_recorded[rows, columns].any(axis=1) & self._is_real[rows]
        if recorded_before.any():
            position = self._positions[rows][int(np.argmax(recorded_before))]
            raise CommError(
                f"Sequence {position} of step {self._step} was recorded 2 times.\n"
                "  Call record() once for every micro-batch, with its rows."
            )
        self._is_recorded[rows, columns] = True
        self.are_complete = self._is_enough_recorded()
        self._recorded.append((rows, counted, sums))

    def total(self) -> NDArray[np.int64]:
        """Return the sums over the losses of a finished step; shape (NUM_BUFFER_ROWS, K).

        Raises:
            CommError: some of its tokens were recorded, but not all.
        """
        if self._recorded and not self.are_complete:
            is_missing = self._is_real & ~self._is_recorded.all(axis=1)
            raise CommError(
                f"Step {self._step} was finished, but only a part of it was recorded: sequence "
                f"{self._positions[int(np.argmax(is_missing))]} was recorded 0 times, or not with all its tokens.\n"
                "  Call record() once for every micro-batch, with its rows, before the step is finished."
            )
        if not self._recorded:
            return np.zeros((NUM_BUFFER_ROWS, self.num_domains), np.int64)
        sums, num_tokens = self.sequence_sums()
        return self.rows_of(sums.quanta, sums.is_finite, num_tokens)

    def sequence_sums(self) -> tuple[SequenceSums, Ints]:
        """Return the loss of every sequence, and the number of its counted tokens."""
        # Parts of one sequence are added before its loss is rounded, as if it had been recorded at once.
        total = SequenceSums(np.zeros(len(self._domain_ids), np.int64), np.zeros(len(self._domain_ids)))
        num_tokens = np.zeros(len(self._domain_ids), np.int64)
        for rows, counted, sums_of_call in self._recorded:
            sums = sums_of_call()
            total.quanta[rows] += sums.quanta
            total.nats[rows] += sums.nats
            num_tokens[rows] += counted
        return total, num_tokens

    def rows_of(self, quanta: Ints, is_finite: NDArray[np.bool_], num_tokens: Ints) -> Ints:
        """Return the sums of the domains, given loss and counted tokens of every sequence."""
        real = self._is_real
        sums = np.where(is_finite, quanta / QUANTA_PER_NAT, np.nan)
        return accumulate_losses(self._domain_ids[real], sums[real], num_tokens[real], self.num_domains)

    def means(self) -> NDArray[np.float32]:
        """Return the mean token loss of every sequence of a finished step; see `means_of`."""
        sums, num_tokens = self.sequence_sums()
        return means_of(sums.quanta, sums.is_finite, num_tokens)

    @property
    def positions(self) -> Ints:
        """Positions of the sequences in the global batch; shape (B,)."""
        return self._positions

    @property
    def num_padding(self) -> int:
        """Rows that stand for no sequence."""
        return int(np.count_nonzero(~self._is_real))

    @property
    def num_counted(self) -> NDArray[np.int64]:
        """Tokens of every sequence that the loss mask counts; shape (B,)."""
        return np.asarray(self._loss_mask.sum(axis=1), np.int64)

    @property
    def num_recorded_tokens(self) -> int:
        """Tokens that were recorded, whether or not they count."""
        return int(self._is_recorded.sum())

    @property
    def coverage(self) -> int:
        """Sum of a weight of every recorded token: differs if other tokens were recorded."""
        return int((self._is_recorded[self._is_real] @ self._token_weights()).sum())

    @property
    def full_coverage(self) -> int:
        """The coverage of all tokens, each recorded once."""
        return int(self._token_weights().sum()) * int(np.count_nonzero(self._is_real))

    def _token_weights(self) -> NDArray[np.int64]:
        # Multiplicative hashing: pseudo-random numbers below 2^31.
        return np.arange(1, self._is_recorded.shape[1] + 1, dtype=np.int64) * 2654435761 % 2**31

    def _is_enough_recorded(self) -> bool:
        # Losses of padding may be recorded, but nobody has to.
        recorded = self._is_recorded[self._is_real]
        if self._num_parts == 1:
            return bool(recorded.all())
        # Which tokens other ranks record is not known here. Until the step is reduced, more can be recorded.
        return bool(recorded.any(axis=1).all())


def means_of(quanta: Ints, is_finite: NDArray[np.bool_], num_tokens: Ints) -> NDArray[np.float32]:
    """Return the mean token loss of every sequence in nats; shape (B,).

    It is NaN for a sequence without counted tokens, which padding is too, and infinite if the loss is not finite.
    """
    means = np.where(is_finite, np.nan, np.inf)
    has_mean = is_finite & (num_tokens > 0)
    np.divide(quanta / QUANTA_PER_NAT, num_tokens, out=means, where=has_mean)
    return means.astype(np.float32)


def _sample_losses(
    loss: Any, num_tokens: Any, is_real: NDArray[np.bool_], tokens: slice | None
) -> tuple[Ints, Callable[[], SequenceSums]]:
    """Return the weights of samples and a function that returns their losses times these; shape (B,).

    Args:
        loss: of every sample; with `num_tokens` the sum over its tokens.
        num_tokens: tokens in each sum, which is the weight of a sample; None for 1.
        is_real: which rows hold a sample.
        tokens: must be None.

    Raises:
        ValueError: the shapes differ, or the samples of a batch were recorded in parts.
    """
    if tokens is not None:
        raise ValueError("record() got tokens=, but with mixture.unit=samples the data plane knows no tokens.")
    expected = is_real.shape
    weights = np.ones(expected, np.int64)
    if num_tokens is not None:
        weights = _on_host(num_tokens).astype(np.int64)
    if tuple(loss.shape) != expected or weights.shape != expected or weights.min(initial=0) < 0:
        raise ValueError(
            f"record() got losses of shape {tuple(loss.shape)} and num_tokens of shape {weights.shape} for "
            f"{expected[0]} samples.\n"
            "  Give one loss per sample, or the sum over its tokens and num_tokens=, one number per sample, at least 0."
        )
    counted = np.where(is_real, weights, 0)
    return counted, _sequence_sums(loss.reshape(-1, 1), (counted > 0)[:, None])


def _given_sums(loss: Any, num_tokens: Any, expected: Ints) -> Callable[[], SequenceSums]:
    """Take sums that the trainer computed, one per sequence; `expected` is the number of tokens each one covers."""
    counted = _on_host(num_tokens).astype(np.int64)
    if counted.shape != expected.shape or tuple(loss.shape) != expected.shape:
        raise ValueError(
            f"record() got num_tokens of shape {counted.shape} and losses of shape {tuple(loss.shape)}, but with "
            f"num_tokens both are one number per sequence: {expected.shape}."
        )
    if (counted != expected).any():
        row = int(np.argmax(counted != expected))
        raise ValueError(
            f"record() got num_tokens={counted[row]} for row {row}, but its loss mask counts {expected[row]} tokens.\n"
            "  Sum the losses where batch.loss_mask is true."
        )
    device = getattr(loss, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        # One column per sequence, all counted: copied without waiting, as losses per token are.
        return _sums_on_device(loss.detach().reshape(-1, 1), np.ones((len(expected), 1), np.bool_))
    sums = _sums_on_host(_on_host(loss).reshape(-1, 1))
    return lambda: sums


def _on_host(values: Any) -> Sums:
    """Return an array or a tensor on any device as an array of float64."""
    if hasattr(values, "detach"):
        # NumPy has no bfloat16.
        return np.asarray(values.detach().double().cpu().numpy())
    return np.array(values, np.float64)


def _sequence_sums(loss_per_token: Any, mask: NDArray[np.bool_]) -> Callable[[], SequenceSums]:
    """Sum the counted losses of every sequence; nats, shape (B,).

    Args:
        loss_per_token: array or torch tensor of shape (B, T), on any device.
        mask: which tokens count; shape (B, T).

    Returns:
        A function that returns the sums, and waits for the accelerator if it has to.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(loss_per_token.shape) != mask.shape:
        raise ValueError(
            f"record() got losses of shape {tuple(loss_per_token.shape)}, but the batch has {mask.shape}.\n"
            "  Give one loss per predicted token: cross-entropy with reduction='none'."
        )
    device = getattr(loss_per_token, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        return _sums_on_device(loss_per_token.detach(), mask)
    if hasattr(loss_per_token, "detach"):
        losses = loss_per_token.detach().float().numpy()
    else:
        losses = np.asarray(loss_per_token)
    # Not `losses * mask`: a masked loss may be infinite or NaN.
    sums = _sums_on_host(np.where(mask, losses, 0))
    return lambda: sums


def _sums_on_host(losses: NDArray[Any]) -> SequenceSums:
    """Sum losses in nats of shape (B, T); tokens that do not count are 0."""
    nats = losses.sum(axis=1, dtype=np.float64)
    # Only losses that are finite have integers; of other sequences the sum in nats says what they are.
    if not (np.abs(nats) < WRAP_LIMIT).all():
        losses = np.where(np.abs(losses) < WRAP_LIMIT, losses, 0)
    quanta = losses * QUANTA_PER_NAT if losses.dtype == np.float64 else losses.astype(np.float64) * QUANTA_PER_NAT
    return SequenceSums(np.rint(quanta, out=quanta).astype(np.int64).sum(axis=1), nats)


def _sums_on_device(losses: Any, mask: NDArray[np.bool_]) -> Callable[[], SequenceSums]:
    """Sum on the accelerator and start the copy to pinned memory; only the returned function waits."""
    import torch  # Heavy and optional; a caller with losses on an accelerator has imported it.

    counted = torch.from_numpy(mask).pin_memory().to(losses.device, non_blocking=True)
    nats = torch.where(counted, losses.double(), 0.0)
    quanta = torch.where(nats.abs() < WRAP_LIMIT, nats, 0.0).mul_(QUANTA_PER_NAT).round_().long().sum(dim=1)
    host_quanta = torch.empty(quanta.shape, dtype=torch.int64, pin_memory=True)
    host_nats = torch.empty(quanta.shape, dtype=torch.float64, pin_memory=True)
    host_quanta.copy_(quanta, non_blocking=True)
    host_nats.copy_(nats.sum(dim=1), non_blocking=True)
    # The event marks the end of the copy in the trainer's stream.
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(losses.device))

    def result() -> SequenceSums:
        arrived.synchronize()
        return SequenceSums(host_quanta.numpy(), host_nats.numpy())

    return result
