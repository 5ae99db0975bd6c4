"""A configuration's query and domains, asked of an index."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domains import DomainKey, Selection, keys_by, select
from mixtera_hpc.core.properties import as_text
from mixtera_hpc.core.query import parse
from mixtera_hpc.errors import MixtureError
from mixtera_hpc.index.open import PropertyIndex

__all__ = ["ChosenDomains", "domain_name", "select_domains", "weights_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDomains:
    """The domains of a mixture; domain_id is the position in every list."""

    selection: Selection
    keys: tuple[DomainKey, ...]
    names: tuple[str, ...]
    """The keys as text, for people."""


def select_domains(config: Config, index: PropertyIndex) -> ChosenDomains:
    """The domains that `mixture.domains` or `mixture.by` name, or one of everything, counted in the index.

    Raises:
        ConfigError: `query.where` does not parse, or names what the index does not have.
        MixtureError: a domain key does.
    """
    keys = _keys(config, index)
    predicate = parse(config.query.where, index.tables.properties)
    selection = select(index.tables, predicate, keys, index.read_block)
    return ChosenDomains(selection=selection, keys=tuple(keys), names=tuple(map(domain_name, keys)))


def domain_name(key: DomainKey) -> str:
    """A key as people read it: `language=en source=C4|CC`."""
    return (
        " ".join(f"{name}={'|'.join('null' if v is None else v for v in values)}" for name, values in key.items())
        or "all"
    )


def weights_of(config: Config, chosen: ChosenDomains, has_tokens: bool) -> NDArray[np.float64] | None:
    """The weights the mixture begins with, shape (num_domains,); None when nobody knows.

    Natural weights are shares of what the mixture counts, without special tokens; where that is tokens and the index has not
    counted them, or nothing is selected, there are none. Unlike `core.mixture.start_weights` this accepts empty domains: it
    is there to show them.
    """
    given = [d.weight for d in config.mixture.domains]
    weights = np.array([w for w in given if w is not None])
    if config.mixture.kind == "natural" or not given or None in given:
        rows, tokens = chosen.selection.table.totals()
        weights = (tokens if config.mixture.unit == "tokens" else rows).astype(np.float64)
        if config.mixture.unit == "tokens" and not has_tokens:
            return None
    return weights / weights.sum() if weights.sum() > 0 else None


def _keys(config: Config, index: PropertyIndex) -> list[DomainKey]:
    if config.mixture.domains:
        return [{name: _values(value) for name, value in domain.key.items()} for domain in config.mixture.domains]
    keys = keys_by(config.mixture.by, index.tables.combos)
    if not keys:
        raise MixtureError(f"mixture.by is {config.mixture.by}, but no sample has any of these properties.")
    return keys


def _values(value: Any) -> tuple[str | None, ...]:
    """One value or several, as YAML has them; matched as text, null as null."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(None if v is None else as_text(v) for v in values)
