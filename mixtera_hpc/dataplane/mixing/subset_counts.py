"""Count the domains of a mixture in an index, and compute the weights that they would be served with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.mixing.configured_weights import query_weights
from mixtera_hpc.dataplane.reading.shared_index import select_subset
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.selection import SelectedDomains, select_domains

__all__ = ["SubsetCounts", "count_subset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetCounts:
    """The domains of a mixture among the samples of a subset."""

    domains: SelectedDomains
    weights: NDArray[np.float64] | None
    """Initial weights of the mixture, shape (K,), sum 1; None if they are unknown (see `query_weights`)."""


def count_subset(config: Config, index: PropertyIndex, subset: SampleSubset) -> SubsetCounts:
    """Count the samples of `subset` in an open index. Price after drops: the domains are counted twice.

    Raises:
        ConfigError: `query.where` or a drop does not parse or names what the index does not have, or nothing is held
            out.
        MixtureError: a domain key names what the index does not have.
    """
    domains = select_subset(config, index, subset)
    # As in a run, weights refer to the sizes before drops, and domains without samples give theirs to the others.
    undropped = select_domains(config, index, subset.split) if subset.drop else domains
    rows, tokens = undropped.selection.table.totals()
    has_tokens = index.tables.has_tokens
    weights = query_weights(config, domains.keys, rows=rows, tokens=tokens if has_tokens else None)
    if weights is not None and subset.drop:
        weights = _without_empty_domains(weights, domains)
    return SubsetCounts(domains=domains, weights=weights)


def _without_empty_domains(weights: NDArray[np.float64], domains: SelectedDomains) -> NDArray[np.float64]:
    """Return `weights` with 0 for domains that have no samples left, sum 1 unless all of them are empty."""
    rows, _ = domains.selection.table.totals()
    remaining = np.where(rows > 0, weights, 0.0)
    total = remaining.sum()
    return remaining / total if total else remaining
