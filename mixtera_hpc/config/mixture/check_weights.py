"""Check the weights of a mixture, or of a stage of its schedule: where they are needed, and what they sum to."""

import math
from collections.abc import Iterator, Sequence

from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, StageConfig

__all__ = ["shaping_problems", "weight_problems"]

SUM_TOLERANCE = 1e-6
"""Sums of weights may differ from 1 by this much: users write decimal fractions."""


def weight_problems(part: MixtureConfig | StageConfig, path: str) -> list[str]:
    """Check that the kind has the domains and weights that it needs, and the sum of weights at every level.

    Args:
        part: a mixture, or a stage of its schedule.
        path: its place in the configuration.
    """
    is_mixture = path == "mixture"
    if part.kind in ("static", "hierarchical") and not part.domains and is_mixture:
        return [
            f"mixture.kind={part.kind} needs mixture.domains, a list of {{key, weight}}. Use mixture.kind=natural for "
            "the shares of the index."
        ]
    if part.kind == "static" and any(domain.domains for domain in part.domains):
        return [f"{path}.domains has groups, but {path}.kind=static allows none. Set {path}.kind=hierarchical."]
    if part.remainder is not None and not part.domains:
        return [f"{path}.remainder holds what the keys of {path}.domains leave over; give {path}.domains."]
    if part.remainder is not None and (part.remainder.key or part.remainder.domains):
        return [f"{path}.remainder has a key or domains, but it is everything else. Move it into {path}.domains."]
    if part.kind == "natural":
        return _ignored_weight(part, path)
    return _sum_problems(part, part.domains, f"{path}.domains", part.remainder)


def _ignored_weight(part: MixtureConfig | StageConfig, path: str) -> list[str]:
    """Name the first weight that `kind=natural` would ignore."""
    weights = list(_written_weights(part.domains, f"{path}.domains"))
    if part.remainder is not None and part.remainder.weight is not None:
        weights.append((f"{path}.remainder", part.remainder.weight))
    return [
        f"{place}.weight is {weight:g}, but {path}.kind=natural takes the shares of the index. Set {path}.kind=static, "
        "or remove the weights."
        for place, weight in weights[:1]
    ]


def _written_weights(domains: Sequence[DomainConfig], path: str) -> Iterator[tuple[str, float]]:
    """Yield the weights of domains and groups, each with its place."""
    for i, domain in enumerate(domains):
        if domain.weight is not None:
            yield f"{path}[{i}]", domain.weight
        yield from _written_weights(domain.domains, f"{path}[{i}].domains")


def _sum_problems(
    part: MixtureConfig | StageConfig, domains: Sequence[DomainConfig], path: str, remainder: DomainConfig | None = None
) -> list[str]:
    """Check the weights of siblings, then those of the groups among them."""
    siblings = [*domains]
    name = path
    if remainder is not None:
        siblings.append(remainder)
        name = f"{path} and its remainder"

    weights = [domain.weight for domain in siblings]
    known = [weight for weight in weights if weight is not None]
    total = math.fsum(known)
    problems = []
    if part.kind == "static" and len(known) < len(weights):
        missing = weights.index(None)
        place = f"{path}[{missing}]" if missing < len(domains) else name
        problems.append(f"{place} has no weight; kind=static needs a weight for every domain.")
    elif 0 < len(known) < len(weights):
        problems.append(f"{name}: some domains have a weight and some have none. Give all of them one, or none.")
    elif known and not sum(known) > 0:
        problems.append(f"{name}: all weights are 0. Give at least one domain a weight.")
    elif known and abs(total - 1) > SUM_TOLERANCE and not part.normalize:
        switch = f"{path.split('.domains')[0]}.normalize=true"
        problems.append(
            f"The weights of {name} sum to {total:.6g}, expected 1 within 1e-6. Set {switch} to scale them."
        )
    for i, domain in enumerate(domains):
        if domain.domains:
            problems += _sum_problems(part, domain.domains, f"{path}[{i}].domains")
    return problems


def shaping_problems(part: MixtureConfig | StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    """Check `temperature` and `unimax_epochs`, which shape natural weights and nothing else."""
    has_own_weights = part.kind in ("static", "hierarchical", "schedule", "arbitrary")
    if part.kind == "dynamic":
        has_own_weights = any(domain.weight is not None for domain in part.domains or mixture.domains)

    problems = []
    for name in ("temperature", "unimax_epochs"):
        value = getattr(part, name)
        if value is None:
            continue
        if not 0 < value < math.inf:
            problems.append(f"{path}.{name} is {value}, expected a number above 0.")
        if has_own_weights:
            problems.append(
                f"{path}.{name} shapes natural weights, but {path}.kind={part.kind} has its own. Remove it, or set "
                f"{path}.kind=natural."
            )
    if part.temperature is not None and part.unimax_epochs is not None:
        problems.append(f"{path}.temperature and {path}.unimax_epochs both shape natural weights. Set one of them.")
    return problems
