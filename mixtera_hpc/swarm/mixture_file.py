"""Write a mixture with given weights as a config file of the group `mixture`, and as a `MixtureConfig`."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.mixture.domain_tree import domain_entries
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.core.domain_keys import DomainKey, canonical_key, domain_key_to_plain

__all__ = ["mixture_text", "static_mixture", "without_fractions", "written_weights"]

Weights = NDArray[np.float64]

DECIMALS = 6
"""Decimals of written weights."""


def written_weights(mixtures: Weights) -> Weights:
    """Return mixtures with the decimals that files have; shape (…, K), sums of 1."""
    rounded = np.round(mixtures, DECIMALS)
    largest = rounded.argmax(axis=-1, keepdims=True)
    missing = 1 - rounded.sum(axis=-1, keepdims=True)
    np.put_along_axis(rounded, largest, np.take_along_axis(rounded, largest, axis=-1) + missing, axis=-1)
    return np.round(rounded, DECIMALS)


def static_mixture(base: MixtureConfig, keys: Sequence[DomainKey], weights: Weights) -> MixtureConfig:
    """Return `base` with fixed weights of its domains; their bounds and epochs stay.

    Args:
        base: the mixture that the swarm was sampled for.
        keys: the key of each domain; an empty one is the remainder.
        weights: shape (K,), sum 1.
    """
    settings = {canonical_key(entry.key): entry.domain for entry in domain_entries(base)}
    domains = []
    remainder = None
    for key, weight in zip(keys, weights.tolist(), strict=True):
        own = settings.get(canonical_key(key), DomainConfig())
        domain = replace(own, key=domain_key_to_plain(key), weight=weight, domains=[])
        if key:
            domains.append(domain)
        else:
            remainder = domain
    return replace(
        base,
        kind="static",
        domains=domains,
        remainder=remainder,
        group_by=[],
        normalize=False,
        temperature=None,
        unimax_epochs=None,
    )


def without_fractions(mixture: MixtureConfig) -> MixtureConfig:
    """Return a mixture for the final run, which has all samples of the domains."""
    domains = [replace(domain, fraction=None) for domain in mixture.domains]
    remainder = mixture.remainder and replace(mixture.remainder, fraction=None)
    return replace(mixture, fraction=1.0, domains=domains, remainder=remainder)


def mixture_text(mixture: MixtureConfig, comment: str) -> str:
    """Return the text of a config file of the group `mixture`, with a comment above it."""
    plain = _changed(mixture, to_plain(mixture))
    plain["domains"] = [_changed(domain, to_plain(domain)) for domain in mixture.domains]
    if mixture.remainder is not None:
        plain["remainder"] = _changed(mixture.remainder, to_plain(mixture.remainder))
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + dump_yaml(plain)


def _changed(value: MixtureConfig | DomainConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(value)
    }
    return {name: plain[name] for name in defaults if getattr(value, name) != defaults[name]}
