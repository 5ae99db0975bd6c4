"""The permutations of `dataplane.shuffle=sequence` belong to the identity of a run: no release may change them."""

import numpy as np

from mixtera_hpc.core.packing.random_permutation import permutation_keys, permute, unpermute


def test_permutations_stay_those_of_all_releases() -> None:
    size = np.full(12, 12)
    keys = permutation_keys(7, np.full(12, 3), np.full(12, 2))
    assert keys[0] == 6516063592272215761
    places = permute(np.arange(12), size, keys)
    assert places.tolist() == [10, 4, 8, 1, 2, 3, 9, 5, 7, 11, 6, 0]
    assert unpermute(places, size, keys).tolist() == list(range(12))

    values = np.array([0, 10**6, 10**12 - 1])
    keys = permutation_keys(2**63, np.array([0, 1, 2]), np.array([0, 0, 9]))
    places = permute(values, np.full(3, 10**12), keys)
    assert places.tolist() == [156916508083, 612016043018, 436122516721]
    assert np.array_equal(unpermute(places, np.full(3, 10**12), keys), values)
