"""Per-token losses → per-sequence sums, wherever the losses are → this rank's part of a step's statistics.

Arrays and CPU tensors are summed at once. Losses on a CUDA device are summed there (`device_sums`) and copied once,
without waiting. The copy is read when the step is reduced, one step later, so that the trainer's stream never stalls.
Losses on any other accelerator are copied to the host at once, which waits for it: not all of them have float64.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, accumulate_losses
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.steps.loss_sums import (
    QUANTA_PER_NAT,
    Ints,
    Rows,
    SequenceSums,
    is_on_cuda,
    on_host,
    sums_on_host,
)
from mixtera_hpc.errors import CommError

if TYPE_CHECKING:
    from mixtera_hpc.dataplane.steps.device_sums import DeviceSums

__all__ = ["StepLosses", "means_of"]


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
        self._has_samples = batch.payloads is not None
        self._mask_of_tokens = batch.loss_mask
        self.num_domains = num_domains
        self._num_parts = num_parts
        self._on_host: list[tuple[Rows, SequenceSums]] = []
        """Rows and their losses, of those that were recorded on the host."""
        self._on_device: DeviceSums | None = None
        """The losses that were recorded on a CUDA device."""
        self.are_complete = False
        """True if every token of every sequence was recorded; with several parts, a part of every sequence."""

    # Many trainers record no losses. Nothing is allocated for them.

    @cached_property
    def _is_real(self) -> NDArray[np.bool_]:
        """Mask of the rows that are not padding; shape (B,)."""
        return self._domain_ids >= 0

    @cached_property
    def _loss_mask(self) -> NDArray[np.bool_]:
        """Mask of the losses that count; shape (B, T), or (B, 1) for samples, which have one loss each."""
        return self._is_real[:, None] if self._has_samples else self._mask_of_tokens

    @cached_property
    def _num_tokens(self) -> Ints:
        """Counted tokens of every sequence whose losses were recorded on the host; shape (B,)."""
        return _zeros((len(self._domain_ids),), np.int64)

    @cached_property
    def _is_recorded(self) -> NDArray[np.bool_]:
        """Mask of the losses that were recorded; shape of `_loss_mask`."""
        return _zeros(self._loss_mask.shape, np.bool_)

    @property
    def has_losses(self) -> bool:
        """True if anything was recorded."""
        return bool(self._on_host) or self._on_device is not None

    @property
    def are_on_host(self) -> bool:
        """True if the sums can be read without waiting for a device."""
        return self._on_device is None or self._on_device.has_arrived

    def rows_at(self, positions: Any, rows: slice) -> Rows:
        """Return `rows` of the part of the batch that has `positions`, as rows of the whole batch.

        Args:
            positions: array or torch tensor on any device; None for the whole batch.

        Raises:
            ValueError: they are not positions of this batch, or occur twice.
        """
        if positions is None or positions is self._positions:
            return rows
        held = on_host(positions).astype(np.int64)
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
        if self._has_samples:
            recorded = _sample_losses(loss, num_tokens, mask[:, 0], tokens)
        elif num_tokens is None:
            recorded = _token_losses(loss, mask)
        else:
            recorded = _given_sums(loss, num_tokens, mask.sum(axis=1))

        recorded_before = self._is_recorded[rows, columns].any(axis=1) & self._is_real[rows]
        if recorded_before.any():
            position = self._positions[rows][int(np.argmax(recorded_before))]
            raise CommError(
                f"Sequence {position} of step {self._step} was recorded 2 times.\n"
                "  Call record() once for every micro-batch, with its rows."
            )
        # Only sums are kept: the losses of a step would be B x T numbers. Values that are no numbers are refused here.
        sums = None if is_on_cuda(loss) else _host_sums(recorded)
        self._is_recorded[rows, columns] = True
        self.are_complete = self._is_enough_recorded()
        if sums is None:
            self._add_on_device(rows, recorded)
        else:
            assert recorded.counted is not None  # Only losses on a device leave it out.
            self._num_tokens[rows] += recorded.counted
            self._on_host.append((rows, sums))

    def total(self) -> NDArray[np.int64]:
        """Return the sums over the losses of a finished step; shape (NUM_BUFFER_ROWS, K).

        Raises:
            CommError: some of its tokens were recorded, but not all.
        """
        if self.has_losses and not self.are_complete:
            is_missing = self._is_real & ~self._is_recorded.all(axis=1)
            raise CommError(
                f"Step {self._step} was finished, but only a part of it was recorded: sequence "
                f"{self._positions[int(np.argmax(is_missing))]} was recorded 0 times, or not with all its tokens.\n"
                "  Call record() once for every micro-batch, with its rows, before the step is finished."
            )
        if not self.has_losses:
            return np.zeros((NUM_BUFFER_ROWS, self.num_domains), np.int64)
        if self._on_device is not None and not self._on_host:
            return self._on_device.domain_sums(self.num_domains)
        sums, num_tokens = self.sequence_sums()
        return self.rows_of(sums.quanta, sums.is_finite, num_tokens)

    def sequence_sums(self) -> tuple[SequenceSums, Ints]:
        """Return the loss of every sequence, and the number of its counted tokens."""
        # Parts of one sequence are added before its loss is rounded, as if it had been recorded at once.
        total = SequenceSums(np.zeros(len(self._domain_ids), np.int64), np.zeros(len(self._domain_ids)))
        num_tokens = self._num_tokens.copy()
        recorded = list(self._on_host)
        if self._on_device is not None:
            on_device, tokens_on_device = self._on_device.sequence_sums()
            recorded.append((slice(None), on_device))
            num_tokens += tokens_on_device
        for rows, sums in recorded:
            total.quanta[rows] += sums.quanta
            total.nats[rows] += sums.nats
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

    def _add_on_device(self, rows: Rows, recorded: "_Recorded") -> None:
        if self._on_device is None:
            # It needs torch, which is optional; a caller with losses on a device has imported it.
            from mixtera_hpc.dataplane.steps.device_sums import DeviceSums

            self._on_device = DeviceSums(recorded.losses.device, self._domain_ids)
        self._on_device.add(rows, recorded.losses.detach(), recorded.mask, recorded.counted, recorded.claimed)
        if self.are_complete:
            self._on_device.start_copy()

    def _is_enough_recorded(self) -> bool:
        # Losses of padding may be recorded, but nobody has to.
        recorded = self._is_recorded[self._is_real]
        if self._num_parts == 1:
            return bool(recorded.all())
        # Which tokens other ranks record is not known here. Until the step is reduced, more can be recorded.
        return bool(recorded.any(axis=1).all())


def _zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return zeros without releasing the interpreter lock, which a reading thread would then hold for up to 5 ms."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(bytearray(num_bytes), dtype).reshape(shape)


def means_of(quanta: Ints, is_finite: NDArray[np.bool_], num_tokens: Ints) -> NDArray[np.float32]:
    """Return the mean token loss of every sequence in nats; shape (B,).

    It is NaN for a sequence without counted tokens, which padding is too, and infinite if the loss is not finite.
    """
    means = np.where(is_finite, np.nan, np.inf)
    has_mean = is_finite & (num_tokens > 0)
    np.divide(quanta / QUANTA_PER_NAT, num_tokens, out=means, where=has_mean)
    return means.astype(np.float32)


class _Recorded(NamedTuple):
    """The losses that one call of `record` adds."""

    losses: Any
    """In nats; array or tensor of shape (b, T), or (b, 1) for sums."""
    mask: NDArray[np.bool_]
    """Mask of the losses that count; shape of `losses`."""
    counted: Ints | None
    """Tokens of every row that count; shape (b,). None if only `claimed` has them."""
    claimed: Any = None
    """The same as the trainer counted them on a CUDA device; None if they are on the host."""


def _sample_losses(loss: Any, num_tokens: Any, is_real: NDArray[np.bool_], tokens: slice | None) -> _Recorded:
    """Return the losses of samples, times their weights.

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
    is_deferred = is_on_cuda(num_tokens) and is_on_cuda(loss) and tuple(num_tokens.shape) == expected
    weights = np.ones(expected, np.int64)
    if num_tokens is not None and not is_deferred:
        weights = on_host(num_tokens).astype(np.int64)
    if tuple(loss.shape) != expected or weights.shape != expected or weights.min(initial=0) < 0:
        raise ValueError(
            f"record() got losses of shape {tuple(loss.shape)} and num_tokens of shape {weights.shape} for "
            f"{expected[0]} samples.\n"
            "  Give one loss per sample, or the sum over its tokens and num_tokens=, one number per sample, at least 0."
        )
    if is_deferred:
        # Read on the device: nothing waits for it here.
        return _Recorded(losses=loss.reshape(-1, 1), mask=is_real[:, None], counted=None, claimed=num_tokens)
    counted = np.where(is_real, weights, 0)
    return _Recorded(losses=loss.reshape(-1, 1), mask=(counted > 0)[:, None], counted=counted)


def _given_sums(loss: Any, num_tokens: Any, expected: Ints) -> _Recorded:
    """Take sums that the trainer computed, one per sequence; `expected` is the number of tokens each one covers."""
    if tuple(num_tokens.shape if hasattr(num_tokens, "shape") else np.shape(num_tokens)) != expected.shape or (
        tuple(loss.shape) != expected.shape
    ):
        raise ValueError(
            f"record() got num_tokens of shape {np.shape(num_tokens)} and losses of shape {tuple(loss.shape)}, but "
            f"with num_tokens both are one number per sequence: {expected.shape}."
        )
    recorded = _Recorded(losses=loss.reshape(-1, 1), mask=np.ones((len(expected), 1), np.bool_), counted=expected)
    if is_on_cuda(num_tokens) and is_on_cuda(loss):
        # Compared on the device: nothing waits for it here.
        return recorded._replace(claimed=num_tokens)
    counted = on_host(num_tokens).astype(np.int64)
    if (counted != expected).any():
        row = int(np.argmax(counted != expected))
        raise ValueError(
            f"record() got num_tokens={counted[row]} for row {row}, but its loss mask counts {expected[row]} tokens.\n"
            "  Sum the losses where batch.loss_mask is true."
        )
    return recorded


def _token_losses(loss_per_token: Any, mask: NDArray[np.bool_]) -> _Recorded:
    """Return the losses of tokens.

    Args:
        loss_per_token: array or torch tensor of shape (B, T), on any device.
        mask: which tokens count; shape (B, T).

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(loss_per_token.shape) != mask.shape:
        raise ValueError(
            f"record() got losses of shape {tuple(loss_per_token.shape)}, but the batch has {mask.shape}.\n"
            "  Give one loss per predicted token: cross-entropy with reduction='none'."
        )
    return _Recorded(losses=loss_per_token, mask=mask, counted=mask.sum(axis=1))


def _host_sums(recorded: _Recorded) -> SequenceSums:
    """Sum losses that are on the host."""
    losses = recorded.losses
    # Sums need all their bits; the losses of tokens are summed in float64 from what they are.
    if hasattr(losses, "detach"):
        losses = losses.detach().cpu()
        losses = losses.double().numpy() if losses.shape[1] == 1 else losses.float().numpy()
    # Not `losses * mask`: a masked loss may be infinite or NaN.
    return sums_on_host(np.where(recorded.mask, np.asarray(losses), 0))
