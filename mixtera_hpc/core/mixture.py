"""Mixtures as weights: what share of the served sequences each domain is wished to have."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError

__all__ = ["MixtureKind", "start_weights"]

MixtureKind = Literal["natural", "static", "dynamic"]


def start_weights(
    kind: MixtureKind, given: Sequence[float | None], sizes: NDArray[np.int64], names: Sequence[str]
) -> NDArray[np.float64]:
    """The weights a run begins with; float64 of shape (K,), summing to 1.

    `static` takes the given ones; `natural` the share of each domain in `sizes`; `dynamic` the given ones if there are any,
    else the natural ones.

    Args:
        given: the user's weight per domain, None where there is none.
        sizes: tokens (or samples) of each domain; shape (K,).
        names: of the domains, for messages.

    Raises:
        MixtureError: a domain is wished but empty, or nothing is selected at all.
    """
    if not sizes.sum():
        raise MixtureError("The query selects no sample of any domain. Run mixtera-hpc query to see the counts.")
    if kind == "natural" or any(w is None for w in given):
        return sizes / sizes.sum()
    weights = np.array(given, np.float64)
    for name, weight, size in zip(names, weights, sizes, strict=True):
        if weight > 0 and size == 0:
            raise MixtureError(
                f"Domain {name} has weight {weight:g}, but the query selects no sample of it.\n"
                "  Give it weight 0, widen query.where, or see the counts with mixtera-hpc query."
            )
    return weights / weights.sum()
