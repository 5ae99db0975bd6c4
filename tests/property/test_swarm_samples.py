"""Mixtures of a swarm, for any prior, bounds and settings."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.swarm.mixture_file import written_weights
from mixtera_hpc.swarm.mixture_space import MixtureSpace
from mixtera_hpc.swarm.sampling import sample_mixtures


@settings(max_examples=60, deadline=None)
@given(
    prior=st.lists(st.floats(0.01, 1e6), min_size=2, max_size=12),
    caps=st.floats(0.0, 1.0),
    floors=st.floats(0.0, 1.0),
    concentration=st.floats(1e-3, 1e3),
    min_share=st.floats(0.0, 0.5),
    seed=st.integers(0, 1 << 40),
)
def test_samples_are_mixtures_within_the_bounds(
    prior: list[float], caps: float, floors: float, concentration: float, min_share: float, seed: int
) -> None:
    size = len(prior)
    low = floors / size
    high = 1 / size + caps * (1 - 1 / size)
    names = tuple(f"d{i}" for i in range(size))
    space = MixtureSpace.of_domains(names, np.array(prior) / sum(prior), np.full(size, low), np.full(size, high))
    swarm = SwarmConfig(concentration=concentration, min_share=min_share, seed=seed)
    mixtures = sample_mixtures(space, 5, swarm)
    assert mixtures.shape == (5, size)
    assert np.allclose(mixtures.sum(axis=1), 1, atol=1e-9)
    assert (mixtures >= low - 1e-9).all()
    assert (mixtures <= high + 1e-9).all()
    assert np.array_equal(mixtures, sample_mixtures(space, 5, swarm)), "the seed decides"
    assert np.array_equal(mixtures[:3], sample_mixtures(space, 3, swarm)), "a larger swarm keeps its proxies"
    written = written_weights(mixtures)
    assert np.allclose(written.sum(axis=1), 1, atol=1e-12), "files have weights that sum to 1"
    assert np.allclose(written, mixtures, atol=1e-6 * size)
