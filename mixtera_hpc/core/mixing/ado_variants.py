"""Adaptive Data Optimization as four people wrote it, as data: what differs is here, what is shared is in `ado`.

`default` is ours: the paper's equations with the known faults of the public codes repaired. The others are kept to
reproduce published trajectories, faults of the method included: `paper` (arXiv 2410.11820), `authors` (the code published
with it) and `mixtera` (the code of arXiv 2502.19790). None of them reproduces a crash.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from mixtera_hpc.core.mixing.law_objective import LawBounds

__all__ = ["ADO_VARIANTS", "AdoVariant"]


OURS = LawBounds()
PUBLISHED = LawBounds(min_epsilon=float(np.exp(0.5)))
"""The published bound on epsilon, 1.65 nats: above the loss of code, which it makes look finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoVariant:
    """Where the published rules differ."""

    share: Literal["realised", "previous", "new"] = "realised"
    """What credit follows: shares of the step's batch, weights before the update, or weights after it."""
    credit_in_warmup: bool = False
    """Credit moves before the mixture does."""
    credit: Literal["power", "spread"] = "power"
    """h^s, or sqrt(h (1 - h)) as the authors' code has it."""
    floor: Literal["exact", "preference", "seen"] = "exact"
    """Project the mixture; or clip and renormalise the preference; or the mixture's domains seen so far."""
    min_alpha: float = 0.0
    """Speeds are computed with at least this exponent."""
    first_step: int = 0
    """Number of the first step in the running average."""
    binned: bool = True
    """Fit binned means; otherwise the filled, smoothed and thinned series."""
    bounds: LawBounds = OURS
    """Where laws are searched."""


ADO_VARIANTS = MappingProxyType(
    {
        "default": AdoVariant(),
        "paper": AdoVariant(share="previous", binned=False, bounds=PUBLISHED),
        "authors": AdoVariant(
            credit_in_warmup=True, credit="spread", floor="preference", min_alpha=0.05, binned=False, bounds=PUBLISHED
        ),
        "mixtera": AdoVariant(share="new", floor="seen", first_step=1, binned=False, bounds=PUBLISHED),
    }
)
