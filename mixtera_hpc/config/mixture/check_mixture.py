"""Check a mixture without an index: domains, weights, bounds, and what belongs to one kind of mixture only."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixtera_hpc.config.check_numbers import bounds_problems
from mixtera_hpc.config.mixture.check_schedule import algorithm_problems, schedule_problems
from mixtera_hpc.config.mixture.check_weights import shaping_problems, weight_problems
from mixtera_hpc.config.mixture.domain_tree import domain_entries, group_names, list_entries
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig
from mixtera_hpc.core.domain_keys import canonical_key, parse_domain_key
from mixtera_hpc.errors import MixtureError

__all__ = ["mixture_problems"]


MAX_WEIGHT = 1e100
"""Larger weights overflow when they are added."""


def mixture_problems(mixture: MixtureConfig) -> list[str]:
    """Return everything wrong with a mixture, one or two sentences each."""
    problems = []
    for domains, path in _domain_lists(mixture):
        problems += _domain_problems(domains, path)
    if mixture.remainder is not None:
        problems += _single_weight(mixture.remainder, "mixture.remainder")
    problems += _group_by_problems(mixture.group_by)
    problems = problems or _repeated_keys(mixture)
    if problems:
        return problems  # The checks below combine keys, which needs valid ones.
    return [
        *weight_problems(mixture, "mixture"),
        *shaping_problems(mixture, mixture, "mixture"),
        *_bound_problems(mixture),
        *_kind_problems(mixture),
    ]


def _domain_lists(mixture: MixtureConfig) -> Iterator[tuple[Sequence[DomainConfig], str]]:
    """Yield the lists of domains of the mixture and of its stages, each with its place."""
    yield mixture.domains, "mixture.domains"
    for i, stage in enumerate(mixture.schedule.stages):
        yield stage.domains, f"mixture.schedule.stages[{i}].domains"


def _domain_problems(domains: Sequence[DomainConfig], path: str) -> list[str]:
    """Check the domains of one list and of the groups in it."""
    problems = []
    for i, domain in enumerate(domains):
        entry_path = f"{path}[{i}]"
        problems += _single_weight(domain, entry_path)
        problems += _key_problems(domain, entry_path)
        problems += _domain_problems(domain.domains, f"{entry_path}.domains")
        for name in ("floor", "cap", "max_epochs", "fraction", "loss_weight") if domain.domains else ():
            if getattr(domain, name) is not None:
                problems.append(f"{entry_path}.{name} is set on a group. Set it on the members of the group.")
    has_weight = [domain.weight is not None for domain in domains]
    if any(has_weight) and not all(has_weight):
        problems.append(f"{path}: some domains have a weight and some have none. Give all of them one, or none.")
    return problems


def _group_by_problems(group_by: Sequence[Any]) -> list[str]:
    """Check that every entry is the name of a property, or a number with buckets."""
    problems = []
    for i, entry in enumerate(group_by):
        path = f"mixture.group_by[{i}]"
        if isinstance(entry, Mapping):
            problems += _bucket_problems(path, entry)
        elif not isinstance(entry, str):
            problems.append(f"{path} is {entry!r}, expected the name of a property.")
    names = [] if problems else group_names(group_by)
    return problems + [
        f"mixture.group_by names {name!r} twice." for name in sorted(set(names)) if names.count(name) > 1
    ]


def _bucket_problems(path: str, entry: Mapping[Any, Any]) -> list[str]:
    example = "{quality: {buckets: [0, 0.5, 1]}}"
    if len(entry) != 1 or not all(isinstance(s, Mapping) and list(s) == ["buckets"] for s in entry.values()):
        return [f"{path} is {dict(entry)!r}, expected the name of a property, or a number with buckets: {example}."]
    ((name, spec),) = entry.items()
    return bounds_problems(f"{path}.{name}.buckets", spec["buckets"])


def _single_weight(domain: DomainConfig, path: str) -> list[str]:
    if domain.weight is None or 0 <= domain.weight <= MAX_WEIGHT:
        return []
    return [f"{path}.weight is {domain.weight}, expected a number of at least 0 and at most {MAX_WEIGHT:g}."]


def _key_problems(domain: DomainConfig, path: str) -> list[str]:
    if not domain.key and not domain.domains:
        return [
            f"{path}.key is empty. Name at least one property, e.g. key: {{language: en}}. For everything that matches "
            "no key, use mixture.remainder."
        ]
    try:
        parse_domain_key(domain.key)
    except MixtureError as error:
        return [f"{path}.key: {error}"]
    return []


def _repeated_keys(mixture: MixtureConfig) -> list[str]:
    """Find groups that name the same property as their members, and keys that occur twice in one list."""
    problems = []
    for domains, path in _domain_lists(mixture):
        first_path: dict[object, str] = {}
        try:
            for entry in list_entries(domains, path):
                earlier = first_path.setdefault(canonical_key(entry.key), entry.path)
                if earlier != entry.path:
                    problems.append(
                        f"{entry.path}.key equals that of {earlier}, which gets all of its samples. Remove one of them."
                    )
        except MixtureError as error:
            problems.append(str(error))
    return problems


def _bound_problems(mixture: MixtureConfig) -> list[str]:
    """Check floors, caps and epoch limits."""
    entries = domain_entries(mixture)
    places: list[tuple[str, MixtureConfig | DomainConfig]] = [("mixture", mixture)]
    places += [(entry.path, entry.domain) for entry in entries]
    problems = []
    for path, place in places:
        problems += _bounds_of_place(path, place, mixture)
    floors = math.fsum(_first_set(entry.domain.floor, mixture.floor, 0.0) for entry in entries)
    if not problems and floors > 1 + 1e-9:
        problems.append(f"The floors of mixture.domains sum to {floors:.6g}, expected at most 1. Lower them.")
    return problems


def _bounds_of_place(path: str, place: MixtureConfig | DomainConfig, mixture: MixtureConfig) -> list[str]:
    """Check the bounds of the mixture or of one domain."""
    problems = []
    for name in ("floor", "cap"):
        value = getattr(place, name)
        if value is not None and not 0 <= value <= 1:
            problems.append(f"{path}.{name} is {value}, expected a share between 0 and 1.")
    low = _first_set(place.floor, mixture.floor, 0.0)
    high = _first_set(place.cap, mixture.cap, 1.0)
    if low > high:
        problems.append(f"{path}: the floor {low:g} is above the cap {high:g}. Lower the floor or raise the cap.")
    loss_weight = getattr(place, "loss_weight", None)
    if loss_weight is not None and not 0 <= loss_weight < math.inf:
        problems.append(f"{path}.loss_weight is {loss_weight}, expected a number of at least 0, or null.")
    if place.max_epochs is not None and not 0 < place.max_epochs < math.inf:
        problems.append(f"{path}.max_epochs is {place.max_epochs}, expected a number above 0, or null.")
    if place.fraction is not None and not 0 < place.fraction <= 1:
        problems.append(f"{path}.fraction is {place.fraction}, expected a share above 0 and at most 1.")
    return problems


def _first_set(*values: float | None) -> float:
    """Return the first value that is not null."""
    return next(value for value in values if value is not None)


def _kind_problems(mixture: MixtureConfig) -> list[str]:
    """Check the keys that belong to one kind of mixture only."""
    if mixture.kind == "schedule":
        return schedule_problems(mixture)
    problems = []
    if mixture.schedule.stages:
        problems.append(f"mixture.schedule has stages, but mixture.kind is {mixture.kind}. Set mixture.kind=schedule.")
    if mixture.kind == "arbitrary":
        for name in ("domains", "group_by", "floor", "cap", "remainder"):
            if getattr(mixture, name):
                problems.append(
                    "mixture.kind=arbitrary serves all selected samples in index order, without domains, but "
                    f"mixture.{name} is set. Remove it, select with query.where, or set mixture.kind=natural."
                )
    if mixture.kind == "dynamic":
        problems += algorithm_problems(mixture.algorithm, "")
    return problems
