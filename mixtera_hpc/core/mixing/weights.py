"""Mixtures as weights: what share of the served sequences each domain is wished to have.

Everything here is a function of the domains' sizes and of what the user wrote; what changes while training is
`dataplane.mixer`. A tree of nodes covers static and hierarchical mixtures: a leaf's weight is the product along its path, and
siblings without weights share their parent's by size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError

__all__ = ["WeightNode", "check_available", "natural_weights", "tree_weights", "unimax_weights"]

Weights = NDArray[np.float64]
Sizes = NDArray[np.int64]

NOTHING = "The query selects no sample of any domain. Run mixtera-hpc query to see the counts."


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNode:
    """A domain, or a group of them."""

    weight: float | None
    """Relative to its siblings; None: they share by size."""
    domain: int = -1
    """The domain_id of a leaf."""
    members: tuple["WeightNode", ...] = ()
    """The members of a group."""

    def has_weight(self) -> bool:
        """Whether there is a weight on it or anywhere below."""
        return self.weight is not None or any(part.has_weight() for part in self.members)

    def domains(self) -> Iterator[int]:
        """The domain_ids below, in written order."""
        if not self.members:
            yield self.domain
        for part in self.members:
            yield from part.domains()


def natural_weights(sizes: Sizes, temperature: float = 1.0) -> Weights:
    """Shares in proportion to size^(1/temperature); shape (K,), sum 1, and 0 for empty domains.

    Temperature 1 gives the natural shares, more makes them more equal (Devlin et al. 2019, multilingual BERT, exponent 0.7;
    Arivazhagan et al. 2019, arXiv 1907.05019, section 4.1, as a temperature).

    Raises:
        MixtureError: there is no data at all.
    """
    if not sizes.sum():
        raise MixtureError(NOTHING)
    if temperature == 1.0:
        return sizes / sizes.sum()
    wish = (sizes / sizes.max()) ** (1 / temperature)
    return wish / wish.sum()


def unimax_weights(sizes: Sizes, max_epochs: float, budget: float) -> Weights:
    """As equal as `max_epochs` passes over every domain allow; shape (K,), sum 1.

    UniMax (Chung et al. 2023, arXiv 2304.09151, algorithm 1): from the smallest domain to the largest, each takes an equal
    share of the budget that is left, but at most `max_epochs` times its size. Where the budget exceeds `max_epochs` passes
    over everything, these are the natural shares.

    Args:
        budget: items (tokens or samples) of the whole run.
    """
    if not sizes.sum():
        raise MixtureError(NOTHING)
    taken, left = np.zeros(len(sizes)), float(budget)
    ascending = np.argsort(sizes, kind="stable")
    for rank, domain in enumerate(ascending):
        taken[domain] = min(left / (len(sizes) - rank), max_epochs * sizes[domain])
        left -= taken[domain]
    return taken / taken.sum()


def tree_weights(nodes: Sequence[WeightNode], sizes: Sizes) -> Weights:
    """Weights of all domains, those that `nodes` does not name at 0; shape (K,), sum 1.

    Siblings' weights count relative to their sum; config checks have refused sums other than 1 where that was not asked for.
    """
    weights = np.zeros(len(sizes))
    _spread(nodes, 1.0, sizes, weights)
    return weights / weights.sum()


def _spread(nodes: Sequence[WeightNode], share: float, sizes: Sizes, weights: Weights) -> None:
    """Divide `share` among siblings."""
    wishes = [node.weight for node in nodes]
    known = [float(w) for w in wishes if w is not None]
    if len(known) < len(nodes):
        known = [float(sum(sizes[d] for d in node.domains())) for node in nodes]
    if not any(known):
        known = [1.0] * len(nodes)  # A group without samples keeps its weight, so that it is refused.
    total = sum(known)
    for node, wish in zip(nodes, known, strict=True):
        if node.members:
            _spread(node.members, share * wish / total, sizes, weights)
        else:
            weights[node.domain] += share * wish / total


def check_available(weights: Weights, sizes: Sizes, names: Sequence[str]) -> None:
    """Refuse to promise what is not there.

    Raises:
        MixtureError: a domain has a weight and no samples, or there are no samples at all.
    """
    if not sizes.sum():
        raise MixtureError(NOTHING)
    empty = np.flatnonzero((weights > 0) & (sizes == 0))
    if len(empty):
        first = int(empty[0])
        raise MixtureError(
            f"Domain {names[first]} has weight {weights[first]:g}, but the query selects no sample of it.\n"
            "  Give it weight 0, widen query.where, or see the counts with mixtera-hpc query."
        )
