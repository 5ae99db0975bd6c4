"""Everything wrong with a mixture that can be seen without an index."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mixtera_hpc.config.mixture.domain_tree import domain_entries, list_entries
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, StageConfig
from mixtera_hpc.core.domain_keys import canonical_key, parse_domain_key
from mixtera_hpc.errors import ConfigError, MixtureError, did_you_mean

__all__ = ["mixture_problems"]


def mixture_problems(mixture: MixtureConfig) -> list[str]:
    """One sentence or two each; empty when there are none."""
    found = _domains(mixture.domains, "mixture.domains")
    found += _weight(mixture.remainder, "mixture.remainder") if mixture.remainder is not None else []
    for i, stage in enumerate(mixture.schedule.stages):
        found += _domains(stage.domains, f"mixture.schedule.stages[{i}].domains")
    found = found or _repeated(mixture)
    if found:
        return found  # What follows puts keys together, which broken ones cannot be.
    return [
        *_weights(mixture, "mixture"),
        *_natural_only(mixture, mixture, "mixture"),
        *_bounds(mixture),
        *_kind(mixture),
    ]


def _domains(domains: Sequence[DomainConfig], path: str) -> list[str]:
    """Of one list of domains and what is below it."""
    found = []
    for i, domain in enumerate(domains):
        here = f"{path}[{i}]"
        found += _weight(domain, here) + _key(domain, here) + _domains(domain.domains, f"{here}.domains")
        for name in ("floor", "cap", "max_epochs") if domain.domains else ():
            if getattr(domain, name) is not None:
                found.append(f"{here}.{name} is set on a group. Set it on the group's members.")
    weighted = [domain.weight is not None for domain in domains]
    if any(weighted) and not all(weighted):
        found.append(f"{path}: some have a weight and some have none. Give all of them one, or none.")
    return found


def _weight(domain: DomainConfig, path: str) -> list[str]:
    if domain.weight is None or 0 <= domain.weight < math.inf:
        return []
    return [f"{path}.weight is {domain.weight}, expected a number of at least 0."]


def _key(domain: DomainConfig, path: str) -> list[str]:
    if not domain.key and not domain.domains:
        return [
            f"{path}.key is empty. Name at least one property, e.g. key: {{language: en}}; for everything else there is "
            "mixture.remainder."
        ]
    try:
        parse_domain_key(domain.key)
    except MixtureError as error:
        return [f"{path}.key: {error}"]
    return []


def _repeated(mixture: MixtureConfig) -> list[str]:
    """Groups that clash with their members, and domains that come twice in one list."""
    lists = [(mixture.domains, "mixture.domains")]
    lists += [(s.domains, f"mixture.schedule.stages[{i}].domains") for i, s in enumerate(mixture.schedule.stages)]
    found = []
    for domains, path in lists:
        first: dict[object, str] = {}
        try:
            for leaf in list_entries(domains, path):
                before = first.setdefault(canonical_key(leaf.key), leaf.path)
                if before != leaf.path:
                    found.append(
                        f"{leaf.path}.key is that of {before}, which has all of its samples. Remove one of them."
                    )
        except MixtureError as error:
            found.append(str(error))
    return found


def _weights(mixture: MixtureConfig | StageConfig, path: str) -> list[str]:
    """Sums, at every level, and that `static` and `hierarchical` have what they need."""
    groups = any(domain.domains for domain in mixture.domains)
    if mixture.kind in ("static", "hierarchical") and not mixture.domains and path == "mixture":
        return [
            f"mixture.kind={mixture.kind} needs mixture.domains, a list of {{key, weight}}. Use mixture.kind=natural for the "
            "shares of the index."
        ]
    if mixture.kind == "static" and groups:
        return [f"{path}.domains has groups, which {path}.kind=static has not. Set {path}.kind=hierarchical."]
    if mixture.remainder is not None and not mixture.domains:
        return [f"{path}.remainder is what the keys of {path}.domains leave; give {path}.domains."]
    if mixture.remainder is not None and (mixture.remainder.key or mixture.remainder.domains):
        return [f"{path}.remainder has a key or domains, but it is everything else. Move it into {path}.domains."]
    if mixture.kind == "natural":
        return _passed_over(mixture, path)
    return _sums(mixture, [*mixture.domains], f"{path}.domains", mixture.remainder)


def _passed_over(mixture: MixtureConfig | StageConfig, path: str) -> list[str]:
    """The first weight that is written and would not be served."""
    found = list(_weighed(mixture.domains, f"{path}.domains"))
    if mixture.remainder is not None and mixture.remainder.weight is not None:
        found.append((f"{path}.remainder", mixture.remainder.weight))
    return [
        f"{place}.weight is {weight:g}, but {path}.kind=natural takes the shares of the index. Set {path}.kind=static, or "
        "leave the weights out."
        for place, weight in found[:1]
    ]


def _weighed(domains: Sequence[DomainConfig], path: str) -> Iterator[tuple[str, float]]:
    """Places of weights, and the weights."""
    for i, domain in enumerate(domains):
        if domain.weight is not None:
            yield f"{path}[{i}]", domain.weight
        yield from _weighed(domain.domains, f"{path}[{i}].domains")


def _sums(
    mixture: MixtureConfig | StageConfig, domains: list[DomainConfig], path: str, remainder: DomainConfig | None = None
) -> list[str]:
    siblings = [*domains, *([remainder] if remainder is not None else [])]
    weights = [d.weight for d in siblings]
    known = [w for w in weights if w is not None]
    of = f"{path} and its remainder" if remainder is not None else path
    found = []
    if mixture.kind == "static" and len(known) < len(weights):
        missing = f"{path}[{weights.index(None)}]" if weights.index(None) < len(domains) else of
        found.append(f"{missing} has no weight; kind=static needs one for every domain.")
    elif 0 < len(known) < len(weights):
        found.append(f"{of}: some have a weight and some have none. Give all of them one, or none.")
    elif known and not sum(known) > 0:
        found.append(f"{of}: all weights are 0. Give at least one domain a weight.")
    elif known and abs(math.fsum(known) - 1) > 1e-6 and not mixture.normalize:
        switch = f"{path.split('.domains')[0]}.normalize=true"
        found.append(
            f"The weights of {of} sum to {math.fsum(known):.6g}, expected 1 within 1e-6. Set {switch} to scale them."
        )
    for i, domain in enumerate(domains):
        found += _sums(mixture, domain.domains, f"{path}[{i}].domains") if domain.domains else []
    return found


def _natural_only(part: MixtureConfig | StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    """Temperature and UniMax shape natural weights; there is nothing to shape where weights are given."""
    found = []
    given = part.kind in ("static", "hierarchical", "schedule", "arbitrary")
    given |= part.kind == "dynamic" and any(d.weight is not None for d in part.domains or mixture.domains)
    for name in ("temperature", "unimax_epochs"):
        value = getattr(part, name)
        if value is None:
            continue
        if not 0 < value < math.inf:
            found.append(f"{path}.{name} is {value}, expected a number above 0.")
        if given:
            found.append(
                f"{path}.{name} shapes natural weights, but {path}.kind={part.kind} has its own. Remove it, or set "
                f"{path}.kind=natural."
            )
    if part.temperature is not None and part.unimax_epochs is not None:
        found.append(
            f"{path}.temperature and {path}.unimax_epochs are two ways to shape natural weights. Set one of them."
        )
    return found


def _bounds(mixture: MixtureConfig) -> list[str]:
    """Floors, caps and epoch limits."""
    places: list[tuple[str, Any]] = [
        ("mixture", mixture),
        *((leaf.path, leaf.domain) for leaf in domain_entries(mixture)),
    ]
    found = []
    for path, place in places:
        for name in ("floor", "cap"):
            value = getattr(place, name)
            if value is not None and not 0 <= value <= 1:
                found.append(f"{path}.{name} is {value}, expected a share between 0 and 1.")
        low, high = (_or(place.floor, mixture.floor, 0.0), _or(place.cap, mixture.cap, 1.0))
        if low > high:
            found.append(f"{path}: its floor {low:g} is above its cap {high:g}. Lower the one or raise the other.")
        if place.max_epochs is not None and not 0 < place.max_epochs < math.inf:
            found.append(f"{path}.max_epochs is {place.max_epochs}, expected a number above 0, or null.")
    floors = math.fsum(_or(leaf.domain.floor, mixture.floor, 0.0) for leaf in domain_entries(mixture))
    if not found and floors > 1 + 1e-9:
        found.append(f"The floors of mixture.domains sum to {floors:.6g}, expected at most 1. Lower them.")
    return found


def _or(*values: float | None) -> float:
    return next(v for v in values if v is not None)


def _kind(mixture: MixtureConfig) -> list[str]:
    """What belongs to one kind only."""
    if mixture.kind == "schedule":
        return _schedule(mixture)
    found = []
    if mixture.schedule.stages:
        found.append(f"mixture.schedule has stages, but mixture.kind is {mixture.kind}. Set mixture.kind=schedule.")
    if mixture.kind == "arbitrary":
        for name in ("domains", "group_by", "floor", "cap", "remainder"):
            if getattr(mixture, name):
                found.append(
                    f"mixture.kind=arbitrary serves everything selected in index order, without domains; mixture.{name} is set. "
                    "Remove it, select with query.where, or set mixture.kind=natural."
                )
    if mixture.kind == "dynamic":
        found += _algorithm(mixture.algorithm, "")
    return found


def _algorithm(algorithm: dict[str, Any], path: str) -> list[str]:
    """The algorithm checks its own parameters."""
    from mixtera_hpc.core.mixing.algorithm import make_algorithm

    parameters = dict(algorithm)
    try:
        make_algorithm(str(parameters.pop("name", "ado")), parameters)
    except ConfigError as error:
        return [f"{path}{error}"]
    return []


def _schedule(mixture: MixtureConfig) -> list[str]:
    schedule = mixture.schedule
    starts = [stage.start for stage in schedule.stages]
    if not starts:
        return [
            "mixture.kind=schedule needs mixture.schedule.stages, a list of {start, kind, …}; the first starts at 0."
        ]
    found = []
    if starts[0] != 0:
        found.append(
            f"mixture.schedule.stages[0].start is {starts[0]:g}, expected 0: a run begins with its first stage."
        )
    for i, (before, start) in enumerate(itertools.pairwise(starts), 1):
        if not before < start < math.inf:
            found.append(f"mixture.schedule.stages[{i}].start is {start:g}, expected more than {before:g} before it.")
    if schedule.unit == "tokens" and mixture.unit == "samples":
        found.append(
            "mixture.schedule.unit=tokens, but mixture.unit=samples counts no tokens. Set mixture.schedule.unit=steps."
        )
    for i, stage in enumerate(schedule.stages):
        found += _stage(stage, mixture, f"mixture.schedule.stages[{i}]")
    return found


def _stage(stage: StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    found = _weights(stage, path) + _natural_only(stage, mixture, path)
    if stage.kind == "dynamic":
        found += _algorithm(stage.algorithm, f"{path}: ")
    if (
        stage.kind in ("static", "hierarchical")
        and not stage.domains
        and not any(d.weight is not None for d in mixture.domains)
    ):
        found.append(f"{path} has no weights, and mixture.domains has none either. Give it domains, or kind: natural.")
    known = {canonical_key(leaf.key): leaf.name for leaf in list_entries(mixture.domains, "")}
    for leaf in list_entries(stage.domains, f"{path}.domains"):
        if known and canonical_key(leaf.key) not in known:
            found.append(
                f"{leaf.path} is {leaf.name}, which is not in mixture.domains. Add it there."
                f"{did_you_mean(leaf.name, list(known.values()))}"
            )
        for name in ("floor", "cap", "max_epochs"):
            if getattr(leaf.domain, name) is not None:
                found.append(f"{leaf.path}.{name} holds for the whole run. Set it in mixture.domains.")
    return found
