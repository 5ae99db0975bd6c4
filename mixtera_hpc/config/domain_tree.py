"""The domains a mixture names, in the order that gives them their ids, and the weights it wishes for them.

Groups are flattened: a domain's key is its own together with its groups'. The stages of a schedule may name domains too; without
`mixture.domains` theirs are put together in the order they are first named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, StageConfig
from mixtera_hpc.core.domain_keys import DomainKey, KeyValue, canonical_key, domain_name, parse_domain_key
from mixtera_hpc.core.mixing.weights import WeightNode, check_available, natural_weights, tree_weights, unimax_weights
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = [
    "REMAINDER",
    "DomainEntry",
    "DomainSizes",
    "display_name",
    "domain_bounds",
    "domain_entries",
    "initial_weights",
    "list_entries",
]

Ids = Mapping[frozenset[tuple[str, frozenset[KeyValue]]], int]

REMAINDER = "remainder"
"""What the domain of everything else is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEntry:
    """A domain as it is written."""

    key: DomainKey
    path: str
    """Where it is written, for messages."""
    domain: DomainConfig

    @property
    def name(self) -> str:
        """What people call it."""
        return display_name(self.key)


def display_name(key: DomainKey) -> str:
    """What people call a domain among others."""
    return domain_name(key) if key else REMAINDER


def domain_entries(mixture: MixtureConfig) -> list[DomainEntry]:
    """The domains in written order, the remainder last; empty where the index decides (`mixture.group_by`).

    Raises:
        MixtureError: a key is not one; a group and its member name the same property.
    """
    found = list_entries(mixture.domains, "mixture.domains")
    if not found and mixture.kind == "schedule":
        first: dict[object, DomainEntry] = {}
        for i, stage in enumerate(mixture.schedule.stages):
            for leaf in list_entries(stage.domains, f"mixture.schedule.stages[{i}].domains"):
                first.setdefault(canonical_key(leaf.key), leaf)
        found = list(first.values())
    remainders = [mixture.remainder, *(stage.remainder for stage in mixture.schedule.stages)]
    for remainder in [r for r in remainders if r is not None and found][:1]:
        found.append(DomainEntry(key={}, path="mixture.remainder", domain=remainder))
    return found


def list_entries(domains: Sequence[DomainConfig], path: str, above: DomainKey | None = None) -> list[DomainEntry]:
    """The leaves below a list of domains and groups."""
    found = []
    for i, domain in enumerate(domains):
        here = f"{path}[{i}]"
        key = _below(above or {}, parse_domain_key(domain.key), here)
        if domain.domains:
            found += list_entries(domain.domains, f"{here}.domains", key)
        else:
            found.append(DomainEntry(key=key, path=here, domain=domain))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSizes:
    """What there is to mix."""

    keys: tuple[DomainKey, ...]
    """Of the domains; domain_id is the position."""
    sizes: NDArray[np.int64]
    """Items of one epoch of each; shape (K,)."""
    budget: int
    """Items of the whole run."""


def initial_weights(
    part: MixtureConfig | StageConfig, mixture: MixtureConfig, stock: DomainSizes
) -> NDArray[np.float64]:
    """The weights that `mixture`, or `part` of its schedule, begins with; shape (K,), sum 1.

    Those that are written, of whatever is there; else natural ones, of the domains that are named.

    Raises:
        MixtureError: a domain is none of the run's, or natural weights are wished for and nothing is there.
    """
    if part is mixture and mixture.kind == "schedule":
        return initial_weights(mixture.schedule.stages[0], mixture, stock)
    domains, remainder = (part.domains, part.remainder) if part.domains else (mixture.domains, mixture.remainder)
    nodes, sizes = _tree(domains, remainder, stock.keys), stock.sizes
    if part.kind != "natural" and any(node.has_weight() for node in nodes):
        return tree_weights(nodes, sizes)
    if nodes:
        named = [domain for node in nodes for domain in node.domains()]
        sizes = np.zeros_like(sizes)
        sizes[named] = stock.sizes[named]
    if part.unimax_epochs is not None:
        return unimax_weights(sizes, part.unimax_epochs, stock.budget)
    return natural_weights(sizes, 1.0 if part.temperature is None else part.temperature)


def domain_bounds(mixture: MixtureConfig, stock: DomainSizes) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Floor and cap of every domain, shape (K,) each, both 0 where there is nothing; None without any.

    Raises:
        MixtureError: they leave no mixture at all, or promise a share to a domain without samples.
    """
    own = {canonical_key(leaf.key): leaf.domain for leaf in domain_entries(mixture)}
    domains = [own.get(canonical_key(key), DomainConfig()) for key in stock.keys]
    if mixture.floor is None and mixture.cap is None and all(d.floor is None and d.cap is None for d in domains):
        return None
    check_available(np.array([d.floor or 0.0 for d in domains]), stock.sizes, [display_name(key) for key in stock.keys])
    there = stock.sizes > 0
    floor = np.array([mixture.floor or 0.0 if d.floor is None else d.floor for d in domains]) * there
    cap = np.array([(1.0 if mixture.cap is None else mixture.cap) if d.cap is None else d.cap for d in domains]) * there
    if floor.sum() > 1 + 1e-9 or cap.sum() < 1 - 1e-9:
        raise MixtureError(
            f"Over {there.sum()} domains with samples the floors sum to {floor.sum():.6g} and the caps to {cap.sum():.6g}; 1 must "
            "lie between.\n  Lower mixture.floor and the domains' floors, or raise mixture.cap and the domains' caps."
        )
    return floor, cap


def _tree(
    domains: Sequence[DomainConfig], remainder: DomainConfig | None, keys: Sequence[DomainKey]
) -> tuple[WeightNode, ...]:
    """The tree of weights over a run's domains."""
    ids = {canonical_key(key): i for i, key in enumerate(keys)}
    nodes = _nodes(domains, {}, ids, [display_name(key) for key in keys])
    if remainder is not None:
        nodes.append(_leaf(remainder, {}, ids, []))
    return tuple(nodes)


def _nodes(domains: Sequence[DomainConfig], above: DomainKey, ids: Ids, names: list[str]) -> list[WeightNode]:
    nodes = []
    for domain in domains:
        key = {**above, **parse_domain_key(domain.key)}
        if domain.domains:
            nodes.append(WeightNode(weight=domain.weight, members=tuple(_nodes(domain.domains, key, ids, names))))
        else:
            nodes.append(_leaf(domain, key, ids, names))
    return nodes


def _leaf(domain: DomainConfig, key: DomainKey, ids: Ids, names: list[str]) -> WeightNode:
    if canonical_key(key) not in ids:
        name = display_name(key)
        raise MixtureError(
            f"{name} is not a domain of this run; weights change while it goes on, domains do not.{did_you_mean(name, names)}"
        )
    return WeightNode(weight=domain.weight, domain=ids[canonical_key(key)])


def _below(above: DomainKey, own: DomainKey, path: str) -> DomainKey:
    if twice := [name for name in own if name in above]:
        raise MixtureError(f"{path}.key names {twice[0]!r}, as the group around it does. Name it in one of the two.")
    return {**above, **own}
