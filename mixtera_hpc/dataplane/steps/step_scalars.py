"""The user's scalars of one step on one rank: a number per sequence for each name in `dataplane.scalars`.

Values on a CUDA device are copied to the host without waiting, and read when the step is reduced, one step later.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.measures.scalars import ROWS_PER_SCALAR, accumulate_scalar
from mixtera_hpc.dataplane.steps.loss_sums import is_on_cuda, on_host
from mixtera_hpc.errors import CommError, did_you_mean

if TYPE_CHECKING:
    from mixtera_hpc.dataplane.steps.device_sums import HostCopy

    ScalarValues = NDArray[np.float64] | HostCopy
    """Values of a scalar, one per row, on the host or on their way to it."""

__all__ = ["NUM_SCALAR_CHECKS", "StepScalars", "checks_of", "values_per_domain"]

NUM_SCALAR_CHECKS = 16
"""Numbers of 32 bits that depend on which sequences have scalars. If k peers of each group record equal copies, each
sum of them is a multiple of k; other copies pass all checks with a probability of k^-16."""

Rows = slice | NDArray[np.int64]


class StepScalars:
    """The scalars that one rank has recorded for one step."""

    def __init__(self, scales: Mapping[str, float], domain_ids: NDArray[np.int64]) -> None:
        """Begin without values.

        Args:
            scales: name → largest absolute value, of all scalars of the run.
            domain_ids: domain of every row of the batch, -1 for padding; shape (B,).
        """
        self._scales = scales
        self._domain_ids = domain_ids
        self._recorded: dict[str, list[tuple[Rows, ScalarValues]]] = {}
        self._has_value = {name: np.zeros(len(domain_ids), np.bool_) for name in scales}

    def copies_of(self, scalars: Mapping[str, Any], rows: Rows, step: int) -> "dict[str, ScalarValues]":
        """Check values of some rows, see `DataPlane.record`, and return copies for `add`.

        Raises:
            ValueError: a scalar is not declared, or has another shape.
            CommError: it was recorded before.
        """
        expected = self._domain_ids[rows].shape
        copies: dict[str, ScalarValues] = {}
        for name, values in scalars.items():
            if name not in self._scales:
                raise ValueError(
                    f"record() got the scalar {name!r}, which is not declared."
                    f"{did_you_mean(name, list(self._scales))}\n"
                    f"  Set dataplane.scalars.{name} to its largest absolute value."
                )
            shape = tuple(values.shape) if hasattr(values, "shape") else np.shape(values)
            if shape != expected:
                raise ValueError(f"record() got {name!r} of shape {shape}, expected a number per sequence: {expected}.")
            if self._has_value[name][rows].any():
                raise CommError(
                    f"The scalar {name!r} of step {step} was recorded 2 times for a sequence.\n"
                    "  Record it once for every micro-batch, with its rows."
                )
            copies[name] = _copy_of(values)
        return copies

    def add(self, copies: "Mapping[str, ScalarValues]", rows: Rows) -> None:
        """Add what `copies_of` has checked."""
        for name, values in copies.items():
            self._has_value[name][rows] = True
            self._recorded.setdefault(name, []).append((rows, values))

    @property
    def are_on_host(self) -> bool:
        """True if the values can be read without waiting for a device."""
        recorded = (values for parts in self._recorded.values() for _, values in parts)
        return all(isinstance(values, np.ndarray) or values.has_arrived for values in recorded)

    def rows(self, num_domains: int) -> NDArray[np.int64]:
        """Return the sums of the domains; shape (3 × number of scalars, K)."""
        blocks = [np.zeros((0, num_domains), np.int64)]
        for name, scale in self._scales.items():
            total = np.zeros((ROWS_PER_SCALAR, num_domains), np.int64)
            for rows, values in self._recorded.get(name, ()):
                domains = self._domain_ids[rows]
                is_real = domains >= 0
                total += accumulate_scalar(domains[is_real], _array(values)[is_real], scale, num_domains)
            blocks.append(total)
        return np.concatenate(blocks)


def _copy_of(values: Any) -> "ScalarValues":
    """Return the values as they are now: the trainer may use their memory again in the next step."""
    if not is_on_cuda(values):
        return np.array(on_host(values))
    # It needs torch, which is optional; a caller with values on a device has imported it.
    from mixtera_hpc.dataplane.steps.device_sums import HostCopy

    return HostCopy(values.detach().double())


def _array(values: "ScalarValues") -> NDArray[np.float64]:
    """Return the values; waits for a device."""
    return values if isinstance(values, np.ndarray) else values.array()


def values_per_domain(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many values every scalar has in every domain, given all rows of scalars; shape (scalars, K)."""
    # The sums come first. Their last bits may differ between copies that were computed on several devices.
    return np.asarray(rows.reshape(-1, ROWS_PER_SCALAR, rows.shape[1])[:, 1:].sum(axis=1), np.int64)


def checks_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers of 32 bits that depend on how many values each domain has; shape (NUM_SCALAR_CHECKS,)."""
    content = np.ascontiguousarray(values_per_domain(rows)).tobytes()
    digest = hashlib.blake2b(content, digest_size=4 * NUM_SCALAR_CHECKS).digest()
    return np.frombuffer(digest, "<u4").astype(np.int64)
