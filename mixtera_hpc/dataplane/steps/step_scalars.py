"""The user's scalars of one step on one rank: a number per sequence for each name in `dataplane.scalars`.

Values on an accelerator stay there until the step is reduced, one step later.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.measures.scalars import ROWS_PER_SCALAR, accumulate_scalar
from mixtera_hpc.errors import CommError, did_you_mean

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
        self._recorded: dict[str, list[tuple[Rows, Any]]] = {}
        self._has_value = {name: np.zeros(len(domain_ids), np.bool_) for name in scales}

    def add(self, scalars: Mapping[str, Any], rows: Rows, step: int) -> None:
        """Add values of some rows; see `DataPlane.record`.

        Raises:
            ValueError: a scalar is not declared, or has another shape.
            CommError: it was recorded before.
        """
        expected = self._domain_ids[rows].shape
        for name, values in scalars.items():
            if name not in self._scales:
                raise ValueError(
                    f"record() got the scalar {name!r}, which is not declared."
                    f"{did_you_mean(name, list(self._scales))}\n"
                    f"  Set dataplane.scalars.{name} to its largest absolute value."
                )
            if tuple(values.shape) != expected:
                raise ValueError(
                    f"record() got {name!r} of shape {tuple(values.shape)}, expected a number per sequence: {expected}."
                )
            if self._has_value[name][rows].any():
                raise CommError(
                    f"The scalar {name!r} of step {step} was recorded 2 times for a sequence.\n"
                    "  Record it once for every micro-batch, with its rows."
                )
            self._has_value[name][rows] = True
            detached = values.detach() if hasattr(values, "detach") else np.array(values, np.float64)
            self._recorded.setdefault(name, []).append((rows, detached))

    def rows(self, num_domains: int) -> NDArray[np.int64]:
        """Return the sums of the domains; shape (3 × number of scalars, K)."""
        blocks = [np.zeros((0, num_domains), np.int64)]
        for name, scale in self._scales.items():
            total = np.zeros((ROWS_PER_SCALAR, num_domains), np.int64)
            for rows, values in self._recorded.get(name, ()):
                domains = self._domain_ids[rows]
                is_real = domains >= 0
                total += accumulate_scalar(domains[is_real], _on_host(values)[is_real], scale, num_domains)
            blocks.append(total)
        return np.concatenate(blocks)


def _on_host(values: Any) -> NDArray[np.float64]:
    """Return an array, or a tensor on any device, as float64; waits for an accelerator."""
    if isinstance(values, np.ndarray):
        return values
    return np.asarray(values.double().cpu().numpy())


def values_per_domain(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many values every scalar has in every domain, given all rows of scalars; shape (scalars, K)."""
    # The sums come first. Their last bits may differ between copies that were computed on several devices.
    return np.asarray(rows.reshape(-1, ROWS_PER_SCALAR, rows.shape[1])[:, 1:].sum(axis=1), np.int64)


def checks_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers of 32 bits that depend on how many values each domain has; shape (NUM_SCALAR_CHECKS,)."""
    content = np.ascontiguousarray(values_per_domain(rows)).tobytes()
    digest = hashlib.blake2b(content, digest_size=4 * NUM_SCALAR_CHECKS).digest()
    return np.frombuffer(digest, "<u4").astype(np.int64)
