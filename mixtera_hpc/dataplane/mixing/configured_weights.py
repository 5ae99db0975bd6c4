"""Weights, bounds and passes of every domain, as the `mixture` of a configuration requests them.

The functions translate keys and defaults of the configuration into arrays; `core.mixing` computes with them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.mixture.domain_tree import display_name, domain_entries
from mixtera_hpc.config.schema import Config, DomainConfig, MixtureConfig, StageConfig
from mixtera_hpc.core.domain_keys import DomainKey, canonical_key, parse_domain_key
from mixtera_hpc.core.mixing.bounds import domain_bounds, project_to_bounds
from mixtera_hpc.core.mixing.weights import WeightNode, WeightRule, initial_weights
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.mixing.context import DomainSizes
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = ["config_bounds", "config_weights", "max_epochs_per_domain", "query_weights"]

Weights = NDArray[np.float64]

DEFAULT_MAX_EPOCHS = {"repeat": None, "redistribute": 1.0, "stop": 1.0}
"""`mixture.on_exhausted` → passes over a domain when `mixture.max_epochs` is null; None is endless."""


def config_weights(part: MixtureConfig | StageConfig, mixture: MixtureConfig, domains: DomainSizes) -> Weights:
    """Return the initial weights of `mixture`, or of one stage of its schedule; shape (K,), sum 1.

    Args:
        part: `mixture` itself, or a stage of its schedule. A schedule begins with the weights of its first stage.

    Raises:
        MixtureError: the mixture names a domain that the run does not have, or natural shares are requested and there
            is no data.
    """
    if part is mixture and mixture.kind == "schedule":
        return config_weights(mixture.schedule.stages[0], mixture, domains)
    return initial_weights(_weight_rule(part, mixture, domains.keys), domains.sizes, domains.budget)


def config_bounds(mixture: MixtureConfig, domains: DomainSizes) -> tuple[Weights, Weights] | None:
    """Return floor and cap of every domain, shape (K,) each; None if the mixture has no bounds.

    Raises:
        MixtureError: see `core.mixing.bounds.domain_bounds`.
    """
    # Two spellings of one key, such as a value and a list of it, are the same domain.
    by_key = {canonical_key(entry.key): entry.domain for entry in domain_entries(mixture)}
    configs = [by_key.get(canonical_key(key), DomainConfig()) for key in domains.keys]
    return domain_bounds(
        [domain.floor for domain in configs],
        [domain.cap for domain in configs],
        default_floor=mixture.floor,
        default_cap=mixture.cap,
        sizes=domains.sizes,
        names=[display_name(key) for key in domains.keys],
    )


def query_weights(
    config: Config, keys: tuple[DomainKey, ...], *, rows: NDArray[np.int64], tokens: NDArray[np.int64] | None
) -> Weights | None:
    """Return the initial weights of selected domains, to show them before a run; shape (K,). None if they are unknown.

    They are unknown if they depend on tokens and the index has not counted any, or if nothing is selected. A run
    refuses a weight on an empty domain; this function returns it.

    Args:
        keys: keys of the domains.
        rows: samples of each domain; shape (K,).
        tokens: tokens of each domain, without special tokens, shape (K,); None if the index has not counted them.

    Raises:
        MixtureError: see `config_weights` and `config_bounds`.
    """
    plane = config.dataplane
    in_tokens = config.mixture.unit == "tokens"
    sizes = tokens if in_tokens else rows
    if sizes is None:
        sizes = np.zeros_like(rows)
    grid = SequenceGrid.of_unit(in_tokens, plane.seq_len, plane.overlap_one_token)
    budget = grid.stride * batch_schedule_of(plane).sequences_before(config.training.num_steps)
    domains = DomainSizes(keys=keys, sizes=sizes, budget=budget)
    try:
        weights = config_weights(config.mixture, config.mixture, domains)
    except MixtureError:
        if sizes.any():
            raise
        return None  # Natural shares of nothing.
    bounds = config_bounds(config.mixture, domains) if sizes.any() else None
    return weights if bounds is None else project_to_bounds(weights, *bounds)


def max_epochs_per_domain(mixture: MixtureConfig, num_domains: int) -> Weights:
    """Return the passes over each domain before it is exhausted, `inf` for endless; shape (K,)."""
    # A mixture without domains has as many as the index gives it, all with the default.
    default = DEFAULT_MAX_EPOCHS[mixture.on_exhausted] if mixture.max_epochs is None else mixture.max_epochs
    own = [entry.domain.max_epochs for entry in domain_entries(mixture)] or [None] * num_domains
    limits = [default if limit is None else limit for limit in own]
    return np.array([np.inf if limit is None else limit for limit in limits], np.float64)


def _weight_rule(part: MixtureConfig | StageConfig, mixture: MixtureConfig, keys: Sequence[DomainKey]) -> WeightRule:
    """Return the rule for the initial weights of `part`; a stage without domains takes those of `mixture`."""
    # A remainder belongs to the list of domains that it completes.
    source = part if part.domains else mixture
    tree = _WeightTree(keys)
    nodes = tree.nodes(source.domains, {})
    if source.domains and source.remainder is not None:
        nodes.append(tree.leaf(source.remainder, {}))
    return WeightRule(
        nodes=tuple(nodes),
        natural=part.kind == "natural",
        temperature=1.0 if part.temperature is None else part.temperature,
        unimax_epochs=part.unimax_epochs,
    )


class _WeightTree:
    """Nodes of the domains and groups of a mixture, with the domain_ids of a run."""

    def __init__(self, keys: Sequence[DomainKey]) -> None:
        """Number the domains by `keys`."""
        self._keys = keys
        self._ids = {canonical_key(key): domain for domain, key in enumerate(keys)}

    def nodes(self, domains: Sequence[DomainConfig], group_key: DomainKey) -> list[WeightNode]:
        """Return the nodes of a list of domains and groups; `group_key` is that of the group around them."""
        nodes = []
        for domain in domains:
            key = {**group_key, **parse_domain_key(domain.key)}
            if domain.domains:
                members = tuple(self.nodes(domain.domains, key))
                nodes.append(WeightNode(weight=domain.weight, members=members))
            else:
                nodes.append(self.leaf(domain, key))
        return nodes

    def leaf(self, domain: DomainConfig, key: DomainKey) -> WeightNode:
        """Return the node of one domain; refuse a domain that the run does not have."""
        domain_id = self._ids.get(canonical_key(key))
        if domain_id is None:
            name = display_name(key)
            raise MixtureError(
                f"{name} is not a domain of this run. Weights can change in an existing run, domains cannot."
                f"{did_you_mean(name, [display_name(key) for key in self._keys])}"
            )
        return WeightNode(weight=domain.weight, domain=domain_id)
