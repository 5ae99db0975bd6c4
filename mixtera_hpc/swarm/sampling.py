"""Sample the mixtures of proxies: a Dirichlet distribution around the prior, then the nearest mixture within bounds.

Every proxy has a random generator of its own, so a swarm that grows keeps the proxies that it has.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.swarm.mixture_space import MixtureSpace

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
    """Return `num` mixtures within the bounds of `space`; shape (num, K), rows of sum 1.

    The same settings give the same mixtures, and a larger `num` appends to them.
    """
    low, high = space.group_bounds(space.low, space.high)
    prior = space.group_shares(space.prior)
    rows = [_sample_groups(prior, low, high, settings, number) for number in range(num)]
    groups = np.array(rows).reshape(num, space.num_groups)
    mixtures: Weights = groups @ space.basis
    return mixtures


def _sample_groups(prior: Weights, low: Weights, high: Weights, settings: SwarmConfig, number: int) -> Weights:
    """Return the shares of the groups in proxy `number`; shape (G,)."""
    generator = np.random.Generator(np.random.PCG64([settings.seed, number]))
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
    return project_to_bounds(shares, low, high)
