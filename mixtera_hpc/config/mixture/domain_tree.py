"""Parse the domains of a mixture: which domains it names, in the order that gives them their domain_ids.

Groups are flattened: the key of a domain is its own key combined with the keys of its groups. The stages of a schedule
may name domains too; without `mixture.domains`, theirs are combined in the order in which they are first named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtera_hpc.config.schema import DomainConfig, MixtureConfig
from mixtera_hpc.core.domain_keys import (
    DomainKey,
    NumberRange,
    canonical_key,
    domain_name,
    parse_domain_key,
    ranges_of_bounds,
)
from mixtera_hpc.errors import MixtureError

__all__ = [
    "REMAINDER",
    "DomainEntry",
    "display_name",
    "domain_entries",
    "domain_fractions",
    "group_names",
    "group_ranges",
    "list_entries",
]

REMAINDER = "remainder"
"""The name of the domain that holds everything that matches no key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEntry:
    """One domain as the configuration writes it."""

    key: DomainKey
    path: str
    """Its place in the configuration, for messages."""
    domain: DomainConfig

    @property
    def name(self) -> str:
        """The name shown to users."""
        return display_name(self.key)


def display_name(key: DomainKey) -> str:
    """Return the name of a domain shown to users; the empty key is the remainder."""
    return domain_name(key) if key else REMAINDER


def domain_entries(mixture: MixtureConfig) -> list[DomainEntry]:
    """Return the domains in written order, the remainder last; empty if the index decides (`mixture.group_by`).

    Raises:
        MixtureError: a key is invalid, or a group and its member name the same property.
    """
    entries = list_entries(mixture.domains, "mixture.domains")
    if not entries and mixture.kind == "schedule":
        entries = _stage_entries(mixture)

    remainders = [mixture.remainder, *(stage.remainder for stage in mixture.schedule.stages)]
    first_remainder = next((remainder for remainder in remainders if remainder is not None), None)
    if entries and first_remainder is not None:
        entries.append(DomainEntry(key={}, path="mixture.remainder", domain=first_remainder))
    return entries


def domain_fractions(mixture: MixtureConfig, num_domains: int) -> list[float] | None:
    """Return the share of each domain's training samples that a run uses; None if it uses all of them."""
    # A mixture without domains has as many as the index gives it, all with the default.
    own = [entry.domain.fraction for entry in domain_entries(mixture)] or [None] * num_domains
    fractions = [mixture.fraction if fraction is None else fraction for fraction in own]
    return fractions if min(fractions) < 1 else None


def group_names(group_by: Sequence[Any]) -> list[str]:
    """Return the properties of `mixture.group_by`, in written order."""
    return [str(next(iter(entry))) if isinstance(entry, Mapping) else str(entry) for entry in group_by]


def group_ranges(group_by: Sequence[Any]) -> dict[str, list[NumberRange]]:
    """Return number property → the ranges that its `buckets` in `mixture.group_by` define."""
    buckets = [item for entry in group_by if isinstance(entry, Mapping) for item in entry.items()]
    return {str(name): ranges_of_bounds(spec["buckets"]) for name, spec in buckets}


def _stage_entries(mixture: MixtureConfig) -> list[DomainEntry]:
    """Return the domains of all stages, each once, in the order in which they are first named."""
    first: dict[object, DomainEntry] = {}
    for i, stage in enumerate(mixture.schedule.stages):
        for entry in list_entries(stage.domains, f"mixture.schedule.stages[{i}].domains"):
            first.setdefault(canonical_key(entry.key), entry)
    return list(first.values())


def list_entries(domains: Sequence[DomainConfig], path: str, group_key: DomainKey | None = None) -> list[DomainEntry]:
    """Return the leaves of a list of domains and groups, in written order.

    Args:
        path: place of the list in the configuration, for messages.
        group_key: key of the groups around the list.

    Raises:
        MixtureError: a key is invalid, or a group and its member name the same property.
    """
    entries = []
    for i, domain in enumerate(domains):
        entry_path = f"{path}[{i}]"
        key = _combined_key(group_key or {}, parse_domain_key(domain.key), entry_path)
        if domain.domains:
            entries += list_entries(domain.domains, f"{entry_path}.domains", key)
        else:
            entries.append(DomainEntry(key=key, path=entry_path, domain=domain))
    return entries


def _combined_key(group_key: DomainKey, own: DomainKey, path: str) -> DomainKey:
    """Return both keys combined; refuse a property that both name."""
    if repeated := [name for name in own if name in group_key]:
        raise MixtureError(
            f"{path}.key names {repeated[0]!r}, as the group around it does. Name it in only one of the two."
        )
    return {**group_key, **own}
