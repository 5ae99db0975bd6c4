"""Check a schedule and its stages, and the parameters of mixing algorithms."""

import itertools
import math
from typing import Any

from mixtera_hpc.config.mixture.check_weights import shaping_problems, weight_problems
from mixtera_hpc.config.mixture.domain_tree import list_entries
from mixtera_hpc.config.mixture.learning import checked_algorithm
from mixtera_hpc.config.schema import MixtureConfig, StageConfig
from mixtera_hpc.core.domain_keys import canonical_key
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["algorithm_problems", "schedule_problems"]


def algorithm_problems(algorithm: dict[str, Any], prefix: str) -> list[str]:
    """Check the name and the parameters of a mixing algorithm.

    Args:
        prefix: begins the message, e.g. with the place of a stage.
    """
    try:
        checked_algorithm(algorithm)
    except ConfigError as error:
        return [f"{prefix}{error}"]
    return []


def schedule_problems(mixture: MixtureConfig) -> list[str]:
    """Check a mixture of `kind=schedule`."""
    stages = mixture.schedule.stages
    if not stages:
        return [
            "mixture.kind=schedule needs mixture.schedule.stages, a list of {start, kind, …}. The first stage starts "
            "at 0."
        ]

    problems = []
    starts = [stage.start for stage in stages]
    if starts[0] != 0:
        problems.append(
            f"mixture.schedule.stages[0].start is {starts[0]:g}, expected 0: a run begins with its first stage."
        )

    for i, (before, start) in enumerate(itertools.pairwise(starts), 1):
        if not before < start < math.inf:
            problems.append(
                f"mixture.schedule.stages[{i}].start is {start:g}, expected more than {before:g}, the start before it."
            )

    if mixture.schedule.unit == "tokens" and mixture.unit == "samples":
        problems.append(
            "mixture.schedule.unit=tokens, but mixture.unit=samples counts no tokens. Set mixture.schedule.unit=steps."
        )
    for i, stage in enumerate(stages):
        problems += _stage_problems(stage, mixture, f"mixture.schedule.stages[{i}]")
    return problems


def _stage_problems(stage: StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    problems = [*weight_problems(stage, path), *shaping_problems(stage, mixture, path)]
    if stage.kind == "dynamic":
        problems += algorithm_problems(stage.algorithm, f"{path}: ")
    needs_weights = stage.kind in ("static", "hierarchical") and not stage.domains
    if needs_weights and not any(domain.weight is not None for domain in mixture.domains):
        problems.append(
            f"{path} has no weights, and mixture.domains has none either. Give it domains, or kind: natural."
        )
    return [*problems, *_stage_domain_problems(stage, mixture, path)]


def _stage_domain_problems(stage: StageConfig, mixture: MixtureConfig, path: str) -> list[str]:
    """Check that the domains of a stage are those of the mixture, and that limits are set there."""
    problems = []
    names = {canonical_key(entry.key): entry.name for entry in list_entries(mixture.domains, "")}
    for entry in list_entries(stage.domains, f"{path}.domains"):
        if names and canonical_key(entry.key) not in names:
            problems.append(
                f"{entry.path} is {entry.name}, which is not in mixture.domains. Add it there."
                f"{did_you_mean(entry.name, list(names.values()))}"
            )
        for name in ("floor", "cap", "max_epochs", "fraction", "loss_weight"):
            if getattr(entry.domain, name) is not None:
                problems.append(f"{entry.path}.{name} holds for the whole run. Set it in mixture.domains.")
    return problems
