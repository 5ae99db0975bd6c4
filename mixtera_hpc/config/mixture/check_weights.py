"""Check the weights of a mixture, or of a stage of its schedule: all needed weights are given, and sum to 1."""

import math
from collections.abc import Iterator, Sequence

from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, StageConfig

__all__ = ["shaping_problems", "weight_problems"]

MIN_TEMPERATURE = 0.01

SUM_TOLERANCE = 1e-6
"""Sums of weights may differ from 1 by this much: users write decimal fractions."""


def weight_problems(stage: MixtureConfig | StageConfig, path: str) -> list[str]:
    """Check that the domains and weights fit the kind, and that the weights of every level sum to 1.

    Args:
        stage: a stage of a schedule, or a whole mixture.
        path: dotted path of `stage` in the configuration.
    """
    # A stage without domains uses those of the mixture.
    is_mixture = path == "mixture"
    if is_mixture and stage.kind in ("static", "hierarchical") and not stage.domains:
        return [
            f"mixture.kind={stage.kind} needs mixture.domains, a list of {{key, weight}}. Use mixture.kind=natural for "
            "the shares of the index."
        ]
    if stage.kind == "static" and any(domain.domains for domain in stage.domains):
        return [f"{path}.domains has groups, but {path}.kind=static allows none. Set {path}.kind=hierarchical."]
    if stage.remainder is not None and not stage.domains:
        if isinstance(stage, MixtureConfig) and any(not isinstance(entry, str) for entry in stage.group_by):
            return _remainder_of_groups(stage.remainder)
        return [
            f"{path}.remainder is given, but {path}.domains is not; the remainder holds what no domain selects. Give "
            f"{path}.domains, or remove {path}.remainder."
        ]
    if stage.remainder is not None and (stage.remainder.key or stage.remainder.domains):
        return [
            f"{path}.remainder has a key or domains, but it always holds what no domain selects. Move its key and "
            f"domains to {path}.domains."
        ]
    if stage.kind == "natural":
        return _ignored_weight(stage, path)
    return _sum_problems(stage, stage.domains, f"{path}.domains", stage.remainder)


def _remainder_of_groups(remainder: DomainConfig) -> list[str]:
    """Check a remainder beside `mixture.group_by`, whose domains have no settings of their own."""
    if remainder == DomainConfig():
        return []
    return [
        "mixture.remainder has settings, but the domains of mixture.group_by have none. Write mixture.remainder={}, or "
        "list the domains in mixture.domains."
    ]


def _ignored_weight(stage: MixtureConfig | StageConfig, path: str) -> list[str]:
    """Return a problem for the first weight that `kind=natural` would ignore."""
    weights = list(_written_weights(stage.domains, f"{path}.domains"))
    if stage.remainder is not None and stage.remainder.weight is not None:
        weights.append((f"{path}.remainder", stage.remainder.weight))
    return [
        f"{place}.weight is {weight:g}, but {path}.kind=natural uses the shares of the index. Set {path}.kind=static, "
        "or remove the weights."
        for place, weight in weights[:1]
    ]


def _written_weights(domains: Sequence[DomainConfig], path: str) -> Iterator[tuple[str, float]]:
    """Yield the path and weight of every domain and group that has a weight."""
    for i, domain in enumerate(domains):
        if domain.weight is not None:
            yield f"{path}[{i}]", domain.weight
        yield from _written_weights(domain.domains, f"{path}[{i}].domains")


def _sum_problems(
    stage: MixtureConfig | StageConfig,
    domains: Sequence[DomainConfig],
    path: str,
    remainder: DomainConfig | None = None,
) -> list[str]:
    """Check the weights of sibling domains, then recurse into groups."""
    siblings = [*domains]
    name = path
    if remainder is not None:
        siblings.append(remainder)
        name = f"{path} and its remainder"

    weights = [domain.weight for domain in siblings]
    known = [weight for weight in weights if weight is not None]
    total = math.fsum(known)

    problems = []
    if stage.kind == "static" and len(known) < len(weights):
        missing = weights.index(None)
        place = f"{path}[{missing}]" if missing < len(domains) else name
        problems.append(f"{place} has no weight; kind=static needs a weight for every domain.")
    elif 0 < len(known) < len(weights):
        problems.append(f"{name}: some domains have a weight and some have none. Give all of them one, or none.")
    elif known and not total > 0:
        problems.append(f"{name}: all weights are 0. Give at least one domain a weight.")
    elif known and abs(total - 1) > SUM_TOLERANCE and not stage.normalize:
        switch = f"{path.split('.domains')[0]}.normalize=true"
        problems.append(
            f"The weights of {name} sum to {total:.6g}, expected 1 within 1e-6. Set {switch} to scale them."
        )

    for i, domain in enumerate(domains):
        if domain.domains:
            problems += _sum_problems(stage, domain.domains, f"{path}[{i}].domains")
    return problems


def shaping_problems(stage: MixtureConfig | StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    """Check `temperature` and `unimax_epochs`, which apply to natural weights only."""
    has_own_weights = stage.kind in ("static", "hierarchical", "schedule", "arbitrary")
    if stage.kind == "dynamic":
        has_own_weights = any(domain.weight is not None for domain in stage.domains or mixture.domains)

    problems = []
    for name in ("temperature", "unimax_epochs"):
        value = getattr(stage, name)
        if value is None:
            continue
        if not 0 < value < math.inf:
            problems.append(f"{path}.{name} is {value}, expected a number above 0.")
        elif name == "temperature" and value < MIN_TEMPERATURE:
            problems.append(
                f"{path}.temperature is {value}, expected at least {MIN_TEMPERATURE}: shares are raised to "
                "1/temperature, and all but the largest domain would vanish."
            )
        if has_own_weights:
            problems.append(
                f"{path}.{name} shapes natural weights, but {path}.kind={stage.kind} has its own. Remove it, or set "
                f"{path}.kind=natural."
            )
    if stage.temperature is not None and stage.unimax_epochs is not None:
        problems.append(f"{path}.temperature and {path}.unimax_epochs both shape natural weights. Set one of them.")
    return problems
