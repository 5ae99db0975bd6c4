"""Domains as they are drawn: the largest by name and colour, the small ones together as `other`, alike in every plot."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.report.run_metrics import Floats, Ints, RunMetrics

__all__ = ["MAX_BANDS", "Band", "bands_of", "common_key", "merged_loss", "merged_sum", "short_names"]

MAX_BANDS = 9
"""As many as have colours that can be told apart; `other` comes on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One colour of the plots."""

    name: str
    domains: tuple[int, ...]
    """domain_ids."""
    color: int
    """Position in the palette; `MAX_BANDS` is the grey of `other`."""


def bands_of(record: RunMetrics) -> list[Band]:
    """Largest first by sequences served; at most `MAX_BANDS` and `other`."""
    served = record.steps.domain_sequences.sum(axis=0)
    order, names = np.argsort(-served, kind="stable").tolist(), short_names(record.domains)
    shown = order if len(order) <= MAX_BANDS + 1 else order[:MAX_BANDS]
    bands = [Band(name=names[d], domains=(d,), color=i) for i, d in enumerate(shown)]
    rest = order[len(shown) :]
    if rest:
        bands.append(Band(name=f"{len(rest)} others", domains=tuple(rest), color=MAX_BANDS))
    return bands


def common_key(names: Sequence[str]) -> str | None:
    """The property when all names are of the form `<property>=…` with the same one."""
    keys = {name.partition("=")[0] if "=" in name else None for name in names}
    return keys.pop() if len(keys) == 1 else None


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the property they have in common: `source=C4`, `source=Book` → `C4`, `Book`."""
    key = common_key(names)
    return list(names) if key is None else [name.removeprefix(f"{key}=") for name in names]


def merged_sum(bands: list[Band], values: NDArray[np.float64]) -> Floats:
    """Per-domain values (N, K) added up per band; (N, number of bands)."""
    return np.stack([values[:, list(band.domains)].sum(axis=1) for band in bands], axis=1)


def merged_loss(band: Band, domain_loss: Floats, domain_tokens: Ints) -> tuple[Floats, Floats]:
    """Loss sum and tokens of a band, from (N, K) per domain; (N,) each."""
    members = list(band.domains)
    tokens = domain_tokens[:, members].astype(np.float64)
    loss = np.nan_to_num(domain_loss[:, members])
    return (loss * tokens).sum(axis=1), tokens.sum(axis=1)
