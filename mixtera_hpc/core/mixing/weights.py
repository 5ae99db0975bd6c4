"""Initial weights of a mixture: which share of the served sequences each domain is requested to have.

Everything here is a pure function of domain sizes and of what the user wrote. A tree of nodes describes static and
hierarchical mixtures: the weight of a leaf is the product of the weights along its path. Siblings without weights share
the weight of their parent in proportion to their sizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError

__all__ = [
    "WeightNode",
    "WeightRule",
    "check_available",
    "initial_weights",
    "natural_weights",
    "tree_weights",
    "unimax_weights",
]

Weights = NDArray[np.float64]
Sizes = NDArray[np.int64]

NO_SAMPLES = "The query selects no sample of any domain. Run mixtera-hpc query to see the counts."


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNode:
    """A domain, or a group of domains, in the tree of a mixture."""

    weight: float | None
    """Relative to the siblings. None: the siblings share by size."""
    domain: int = -1
    """The domain_id of a leaf; -1 for a group."""
    members: tuple["WeightNode", ...] = ()
    """The members of a group; empty for a leaf."""

    def has_weight(self) -> bool:
        """Return True if this node or any node below it has a weight."""
        return self.weight is not None or any(member.has_weight() for member in self.members)

    def domains(self) -> Iterator[int]:
        """Yield the domain_ids of all leaves below this node, in written order."""
        if not self.members:
            yield self.domain
        for member in self.members:
            yield from member.domains()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """The rule that gives a mixture, or one stage of a schedule, its initial weights."""

    nodes: tuple[WeightNode, ...] = ()
    """The domains of the mixture. Empty: all domains of the run, in natural shares."""
    natural: bool = False
    """Ignore written weights and take natural shares."""
    temperature: float = 1.0
    """See `natural_weights`."""
    unimax_epochs: float | None = None
    """Shape natural shares with `unimax_weights`, at most this many passes over each domain."""


def initial_weights(rule: WeightRule, sizes: Sizes, budget: float) -> Weights:
    """Return the weights that `rule` gives domains of `sizes` items; shape (K,), sum 1.

    Written weights win. Without any, the named domains get natural shares and all other domains get 0.

    Args:
        budget: items (tokens or samples) of the whole run; used by UniMax only.

    Raises:
        MixtureError: natural shares are requested, but there is no data.
    """
    if not rule.natural and any(node.has_weight() for node in rule.nodes):
        return tree_weights(rule.nodes, sizes)
    if rule.nodes:
        # Domains that the mixture does not name count as empty.
        named = [domain for node in rule.nodes for domain in node.domains()]
        named_sizes = np.zeros_like(sizes)
        named_sizes[named] = sizes[named]
        sizes = named_sizes
    if rule.unimax_epochs is not None:
        return unimax_weights(sizes, rule.unimax_epochs, budget)
    return natural_weights(sizes, rule.temperature)


def natural_weights(sizes: Sizes, temperature: float = 1.0) -> Weights:
    """Return shares in proportion to size^(1/temperature); shape (K,), sum 1, and 0 for empty domains.

    Temperature 1 gives the natural shares; a higher temperature makes the domains more equal (Devlin et al. 2019,
    multilingual BERT, exponent 0.7; Arivazhagan et al. 2019, arXiv 1907.05019, section 4.1, as a temperature).

    Raises:
        MixtureError: there is no data.
    """
    if not sizes.sum():
        raise MixtureError(NO_SAMPLES)
    if temperature == 1.0:
        return sizes / float(sizes.sum())
    # Dividing by the largest size first keeps the power within range for sizes up to 2^63.
    scaled = (sizes / sizes.max()) ** (1 / temperature)
    weights: Weights = scaled / scaled.sum()
    return weights


def unimax_weights(sizes: Sizes, max_epochs: float, budget: float) -> Weights:
    """Return shares that are as equal as `max_epochs` passes over every domain allow; shape (K,), sum 1.

    UniMax (Chung et al. 2023, arXiv 2304.09151, algorithm 1): in ascending order of size, each domain takes an equal
    share of the remaining budget, but at most `max_epochs` times its size. If the budget exceeds `max_epochs` passes
    over all data, the result equals the natural shares.

    Args:
        budget: items (tokens or samples) of the whole run.

    Raises:
        MixtureError: there is no data.
    """
    if not sizes.sum():
        raise MixtureError(NO_SAMPLES)
    # Small domains first: what they cannot take is shared by the larger ones.
    allotted = np.zeros(len(sizes))
    remaining = float(budget)
    ascending = np.argsort(sizes, kind="stable")
    for rank, domain in enumerate(ascending):
        equal_share = remaining / (len(sizes) - rank)
        allotted[domain] = min(equal_share, max_epochs * sizes[domain])
        remaining -= allotted[domain]
    return allotted / float(allotted.sum())


def tree_weights(nodes: Sequence[WeightNode], sizes: Sizes) -> Weights:
    """Return the weights of all domains, 0 for domains that `nodes` does not name; shape (K,), sum 1.

    The weights of siblings count relative to their sum. Checks of the configuration have already refused sums other
    than 1 unless `normalize` was set.
    """
    weights = np.zeros(len(sizes))
    _distribute(nodes, 1.0, sizes, weights)
    return weights / float(weights.sum())


def _distribute(nodes: Sequence[WeightNode], share: float, sizes: Sizes, weights: Weights) -> None:
    """Divide `share` among siblings and add the shares of leaves to `weights`, in place."""
    # Written weights count only if all siblings have one; checks have refused a mixture of both.
    relative = [float(node.weight) for node in nodes if node.weight is not None]
    if len(relative) < len(nodes):
        relative = [float(sum(sizes[d] for d in node.domains())) for node in nodes]
    if not any(relative):
        # A group without samples keeps its weight here, so that `check_available` can refuse it by name.
        relative = [1.0] * len(nodes)

    total = sum(relative)
    for node, own in zip(nodes, relative, strict=True):
        if node.members:
            _distribute(node.members, share * own / total, sizes, weights)
        else:
            weights[node.domain] += share * own / total


def check_available(weights: Weights, sizes: Sizes, names: Sequence[str]) -> None:
    """Refuse weights on domains that have no samples.

    Raises:
        MixtureError: a domain has a weight and no samples, or there are no samples at all.
    """
    if not sizes.sum():
        raise MixtureError(NO_SAMPLES)
    empty = np.flatnonzero((weights > 0) & (sizes == 0))
    if len(empty):
        first = int(empty[0])
        raise MixtureError(
            f"Domain {names[first]} has weight {weights[first]:g}, but the query selects no sample of it.\n"
            "  Give it weight 0, widen query.where, or see the counts with mixtera-hpc query."
        )
