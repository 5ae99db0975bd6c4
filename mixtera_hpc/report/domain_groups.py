"""Groups of domains for plots: each large domain has its own color, all small domains share a gray one.

Every plot of a report uses the same groups, so a color means the same domain everywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.report.mixing.domain_names import shorten_names
from mixtera_hpc.report.run_metrics import Floats, Ints, RunMetrics

__all__ = [
    "MAX_GROUPS",
    "DomainGroup",
    "group_domains",
    "group_loss",
    "sum_by_group",
]

MAX_GROUPS = 9
"""Number of domains with a separate color; more colors are hard to distinguish. The gray group comes in addition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainGroup:
    """Domains that are drawn together in one color."""

    name: str
    domains: tuple[int, ...]
    """Domain ids."""
    color: int
    """Index into the palette; `MAX_GROUPS` is the gray of the small domains."""


def group_domains(metrics: RunMetrics) -> list[DomainGroup]:
    """Group the domains of a run, largest first by sequences served: at most `MAX_GROUPS` domains, then all others."""
    num_sequences = metrics.steps.domain_sequences.sum(axis=0)
    by_size = np.argsort(-num_sequences, kind="stable").tolist()
    names = shorten_names(metrics.domains)

    # A single small domain takes the place of the gray group.
    num_single = len(by_size) if len(by_size) <= MAX_GROUPS + 1 else MAX_GROUPS
    groups = [
        DomainGroup(name=names[domain], domains=(domain,), color=i) for i, domain in enumerate(by_size[:num_single])
    ]
    others = by_size[num_single:]
    if others:
        groups.append(DomainGroup(name=f"{len(others)} others", domains=tuple(others), color=MAX_GROUPS))
    return groups


def sum_by_group(groups: list[DomainGroup], values: NDArray[np.float64]) -> Floats:
    """Sum per-domain values (N, K) over the domains of each group; returns (N, number of groups)."""
    return np.stack([values[:, list(group.domains)].sum(axis=1) for group in groups], axis=1)


def group_loss(group: DomainGroup, domain_loss: Floats, domain_tokens: Ints) -> tuple[Floats, Floats]:
    """Return summed loss and number of tokens of a group, shape (N,) each, from mean losses and tokens (N, K).

    A domain without a loss (NaN) has no tokens either and adds nothing.
    """
    members = list(group.domains)
    tokens = domain_tokens[:, members].astype(np.float64)
    loss = np.nan_to_num(domain_loss[:, members])
    return (loss * tokens).sum(axis=1), tokens.sum(axis=1)
