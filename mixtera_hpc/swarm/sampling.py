"""Sample the mixtures of proxies: a Dirichlet distribution around the prior, then the nearest mixture within bounds.

Every proxy has a random generator of its own, so a swarm that grows keeps the proxies that it has.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.swarm.mixture_space import MixtureSpace
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["default_num_proxies", "sample_mixtures", "tempered"]

Weights = NDArray[np.float64]

PROXIES_PER_GROUP = 3
MIN_PROXIES = 8
"""Fewer proxies leave nothing to validate a regression with."""


def default_num_proxies(space: MixtureSpace) -> int:
    """Return a number of proxies that determines the effect of every group: a small multiple of their number."""
    return max(PROXIES_PER_GROUP * space.num_groups, MIN_PROXIES)


def tempered(weights: Weights, temperature: float) -> Weights:
    """Return weights^(1/temperature), with sum 1; shape (K,). Zeros stay."""
    scaled: Weights = (weights / weights.max()) ** (1 / temperature)
    return scaled / float(scaled.sum())


def sample_mixtures(space: MixtureSpace, num: int, settings: SwarmConfig) -> Weights:
    """Return `num` mixtures within the bounds of `space`; shape (num, C), rows of sum 1 for every phase.

    The same settings give the same mixtures, and a larger `num` appends to them.
    """
    low, high = space.group_bounds(space.low, space.high)
    priors = by_phase(space.group_shares(space.prior), space.num_phases)
    rows = []
    for number in range(num):
        generator = np.random.Generator(np.random.PCG64([settings.seed, number]))
        # The phases are independent of each other, except for the limits of the whole run.
        drawn = [_draw_shares(prior, settings, generator) for prior in priors]
        groups = space.project(np.concatenate(drawn), low, high)
        rows.append(space.keep_limits(groups @ space.basis))
    return np.array(rows).reshape(num, len(space.prior))


def _draw_shares(prior: Weights, settings: SwarmConfig, generator: np.random.Generator) -> Weights:
    """Return random shares of the groups in one phase, without bounds; shape of `prior`."""
    used = np.flatnonzero(prior > 0)
    drawn = generator.standard_gamma(settings.concentration * len(used) * prior[used])
    if not drawn.sum() > 0:
        # All draws of a very small concentration underflow. Its limit is a mixture of one domain.
        drawn = np.zeros(len(used))
        drawn[generator.choice(len(used), p=prior[used] / prior[used].sum())] = 1.0

    shares = np.zeros(len(prior))
    shares[used] = drawn / drawn.sum()
    small = shares < min(settings.min_share, shares.max())
    shares[small] = 0.0
    return shares
