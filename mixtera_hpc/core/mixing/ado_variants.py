"""Adaptive Data Optimization as four groups wrote it, as data: this file holds the differences, `ado` the shared part.

`default` is ours: the equations of the paper, with the known faults of the public codes repaired. The others reproduce
published trajectories, including faults of the method: `paper` (arXiv 2410.11820), `authors` (the code published with
it, commit bc3d8d0), `authors-first` (its first commit 731863d, whose update rule the authors corrected) and `mixtera`
(the code of arXiv 2502.19790). None of them reproduces a crash.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from mixtera_hpc.core.mixing.laws.law_objective import LawBounds

__all__ = ["ADO_VARIANTS", "AdoVariant"]


OUR_BOUNDS = LawBounds(huber_delta=3e-2)
"""Means of bins scatter by about 0.005 around a law, those of the first bins by 0.02. With the published 0.001 nearly
all of them would count linearly, as in a median, which makes the error of speeds a tenth larger."""
PUBLISHED_BOUNDS = LawBounds(min_epsilon=float(np.exp(0.5)))
"""The published bound on epsilon, 1.65 nats. It exceeds the loss of code, which then looks fully learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoVariant:
    """Options in which the published rules differ."""

    share: Literal["realised", "previous", "new"] = "realised"
    """Shares that credit follows: those of the step's batch, the weights before the update, or those after it."""
    credit_in_warmup: bool = False
    """Credit moves before the mixture does."""
    credit: Literal["power", "spread"] = "power"
    """h^s, or sqrt(h (1 - h)) as in the first commit of the authors."""
    floor: Literal["exact", "preference", "seen"] = "exact"
    """Project the mixture onto the floor; or clip and renormalise the preference; or clip and renormalise the mixture
    over the domains seen so far."""
    min_alpha: float = 0.0
    """Speeds are computed with at least this exponent as a factor."""
    first_step: int = 0
    """Number of the first step in the running average."""
    binned: bool = True
    """Fit binned means; otherwise the filled, smoothed and thinned series."""
    averages: bool = False
    """Speeds are those of laws with averaged exponents (`laws.law_averaging`), not those of the laws that fit best."""
    bounds: LawBounds = OUR_BOUNDS
    """The box that laws are searched in."""


AUTHORS = AdoVariant(credit_in_warmup=True, floor="preference", min_alpha=0.05, binned=False, bounds=PUBLISHED_BOUNDS)

ADO_VARIANTS = MappingProxyType(
    {
        "default": AdoVariant(averages=True),
        "paper": AdoVariant(share="previous", binned=False, bounds=PUBLISHED_BOUNDS),
        "authors": AUTHORS,
        "authors-first": replace(AUTHORS, credit="spread"),
        "mixtera": AdoVariant(share="new", floor="seen", first_step=1, binned=False, bounds=PUBLISHED_BOUNDS),
    }
)
"""`mixture.algorithm.variant` → its rules."""
