"""Write a mixture with given weights as a config file of the group `mixture`, and as a `MixtureConfig`."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.mixture.domain_tree import domain_entries
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, ScheduleConfig, StageConfig
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.core.domain_keys import DomainKey, canonical_key, domain_key_to_plain
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["fixed_mixture", "mixture_text", "without_fractions", "written_weights"]

Weights = NDArray[np.float64]

DECIMALS = 6
"""Decimals of written weights."""


def written_weights(mixtures: Weights, num_phases: int = 1) -> Weights:
    """Return mixtures with the decimals that files have; shape (…, C), sums of 1 in every phase."""
    rounded = np.round(by_phase(mixtures, num_phases), DECIMALS)
    largest = rounded.argmax(axis=-1, keepdims=True)
    missing = 1 - rounded.sum(axis=-1, keepdims=True)
    np.put_along_axis(rounded, largest, np.take_along_axis(rounded, largest, axis=-1) + missing, axis=-1)
    return np.round(rounded, DECIMALS).reshape(mixtures.shape)


def fixed_mixture(
    base: MixtureConfig, keys: Sequence[DomainKey], weights: Weights, schedule: ScheduleConfig | None = None
) -> MixtureConfig:
    """Return `base` with fixed weights of its domains; their bounds and epochs stay.

    Args:
        base: the mixture that the swarm was sampled for.
        keys: the key of each domain; an empty one is the remainder.
        weights: shape (C,), sum 1 in every phase.
        schedule: unit, and a stage with its start for every phase; None for one phase.
    """
    num_phases = 1 if schedule is None else len(schedule.stages)
    rows = by_phase(weights, num_phases).tolist()
    settings = {canonical_key(entry.key): entry.domain for entry in domain_entries(base)}
    own = [settings.get(canonical_key(key), DomainConfig()) for key in keys]
    plain = replace(base, group_by=[], normalize=False, temperature=None, unimax_epochs=None)
    if schedule is None:
        domains, remainder = _listed(keys, own, rows[0])
        return replace(plain, kind="static", domains=domains, remainder=remainder)
    # Stages have the weights; bounds, epochs and factors of the loss hold for the whole run.
    domains, remainder = _listed(keys, own, [None] * len(keys))
    stages = []
    for stage, row in zip(schedule.stages, rows, strict=True):
        listed, rest = _listed(keys, [DomainConfig()] * len(keys), row)
        stages.append(replace(stage, domains=listed, remainder=rest))
    return replace(
        plain, kind="schedule", domains=domains, remainder=remainder, schedule=replace(schedule, stages=stages)
    )


def _listed(
    keys: Sequence[DomainKey], own: Sequence[DomainConfig], weights: Sequence[float | None]
) -> tuple[list[DomainConfig], DomainConfig | None]:
    """Return the domains with their weights, and the remainder, if one key is empty."""
    domains = []
    remainder = None
    for key, settings, weight in zip(keys, own, weights, strict=True):
        domain = replace(settings, key=domain_key_to_plain(key), weight=weight, domains=[])
        if key:
            domains.append(domain)
        else:
            remainder = domain
    return domains, remainder


def without_fractions(mixture: MixtureConfig) -> MixtureConfig:
    """Return a mixture for the final run, which has all samples of the domains."""
    remainder = mixture.remainder and replace(mixture.remainder, fraction=None)
    return replace(mixture, fraction=1.0, domains=_whole(mixture.domains), remainder=remainder)


def _whole(domains: Sequence[DomainConfig]) -> list[DomainConfig]:
    return [replace(domain, fraction=None, domains=_whole(domain.domains)) for domain in domains]


def mixture_text(mixture: MixtureConfig, comment: str) -> str:
    """Return the text of a config file of the group `mixture`, with a comment above it."""
    plain = _with_domains(mixture)
    if "schedule" in plain:
        plain["schedule"] = {
            **_changed(mixture.schedule, to_plain(mixture.schedule)),
            "stages": [_with_domains(stage) for stage in mixture.schedule.stages],
        }
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + dump_yaml(plain)


def _with_domains(mixture: MixtureConfig | StageConfig) -> dict[str, Any]:
    """Return the fields that differ from their defaults, also those of the domains."""
    plain = _changed(mixture, to_plain(mixture))
    plain["domains"] = [_changed(domain, to_plain(domain)) for domain in mixture.domains]
    if mixture.remainder is not None:
        plain["remainder"] = _changed(mixture.remainder, to_plain(mixture.remainder))
    return plain


def _changed(
    value: MixtureConfig | StageConfig | ScheduleConfig | DomainConfig, plain: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(value)
    }
    return {name: plain[name] for name in defaults if getattr(value, name) != defaults[name]}
