"""The values that the planner takes and returns: the position of a run, and the plan of one chunk.

A plan takes 24 bytes per domain, regardless of the number of steps in the chunk: the cursor, lag and weight of each
domain at the first slot. Rank 0 broadcasts it as one buffer with a digest; `Planner` expands it on every rank.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import CommError

__all__ = ["ChunkPlan", "PlannerState"]

Ints = NDArray[np.int64]
_DIGEST_PLACE = np.zeros(1, np.int64)
"""The last element of a plan's buffer, before the digest is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerState:
    """The position of a run: O(K) integers for K domains, regardless of the number of steps."""

    chunk: int
    """Chunks planned so far."""
    step: int
    """Steps planned so far."""
    cursors: Ints
    """Sequences planned from each domain's stream; shape (K,)."""
    lags: Ints
    """Share minus sequences served, in units of 2^-40 sequence; sums to 0. Shape (K,)."""

    @classmethod
    def start(cls, num_domains: int) -> "PlannerState":
        """Return the state before the first step."""
        zeros = np.zeros(num_domains, np.int64)
        return cls(chunk=0, step=0, cursors=zeros, lags=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """The assignment of `num_steps` consecutive steps."""

    chunk: int
    first_step: int
    num_steps: int
    """Fewer than `chunk_steps`, possibly 0, if the data ends in this chunk."""
    last: bool
    """True if no chunk follows, because one domain or all of them are exhausted."""
    cursors: Ints
    """At the first slot; shape (K,)."""
    lags: Ints
    """At the first slot, in units of 2^-40 sequence; shape (K,)."""
    weights: Ints
    """At the first slot, in units of 2^-40; sums to 2^40. Shape (K,)."""

    def to_array(self) -> Ints:
        """Return the plan as one int64 buffer of shape (array_size(K),); the last element is the digest."""
        buffer = self._without_digest()
        buffer[-1] = _digest(buffer[:-1])
        return buffer

    def is_equal(self, other: "ChunkPlan") -> bool:
        """Return True if both plans have the same content."""
        if self is other:
            return True
        return self.chunk == other.chunk and np.array_equal(self._without_digest(), other._without_digest())

    def _without_digest(self) -> Ints:
        """Return the buffer of `to_array` with 0 in place of the digest."""
        # Layout: chunk, first_step, num_steps, last, K cursors, K lags, K weights, digest.
        head = [self.chunk, self.first_step, self.num_steps, int(self.last)]
        return np.concatenate([np.array(head, np.int64), self.cursors, self.lags, self.weights, _DIGEST_PLACE])

    @classmethod
    def from_array(cls, buffer: Ints) -> "ChunkPlan":
        """Rebuild a plan from the buffer of `to_array`.

        Raises:
            CommError: the digest does not match the content, so the buffer was damaged in transit.
        """
        if _digest(buffer[:-1]) != buffer[-1]:
            raise CommError("A chunk plan was damaged in transit: its digest does not match its content.")
        # Copy: the caller receives the next plan into the same buffer.
        cursors, lags, weights = buffer[4:-1].reshape(3, -1).copy()
        chunk, first_step, num_steps, last = (int(n) for n in buffer[:4])
        return cls(
            chunk=chunk,
            first_step=first_step,
            num_steps=num_steps,
            last=bool(last),
            cursors=cursors,
            lags=lags,
            weights=weights,
        )

    @staticmethod
    def array_size(num_domains: int) -> int:
        """Return the number of elements of `to_array`: 4 scalars, 3 values per domain and the digest."""
        return 5 + 3 * num_domains

    @property
    def digest(self) -> int:
        """64-bit digest of the content, as a signed integer."""
        return int(self.to_array()[-1])


def _digest(body: Ints) -> np.int64:
    """Return the first 8 bytes of the BLAKE2b digest of the little-endian buffer as a signed integer."""
    # The bytes are in little-endian order on every machine, so digests of different machines can be compared.
    raw = hashlib.blake2b(np.ascontiguousarray(body, "<i8").tobytes(), digest_size=8).digest()
    digest: np.int64 = np.frombuffer(raw, "<i8")[0]
    return digest
