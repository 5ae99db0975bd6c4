"""Reuse an earlier swarm when domains are added: its proposal keeps its ratios, and its runs take part in the fit.

As in Olmix (arXiv 2602.12237, section 4), the domains of the earlier swarm become one group with the ratios of its
proposal. New proxies only determine the share of this group and of the new domains, so a few of them suffice. The
earlier runs, with share 0 of the new domains, add to what is known about the earlier domains.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError, MixtureError
from mixtera_hpc.swarm.mixture_space import MixtureSpace
from mixtera_hpc.swarm.swarm_folder import SwarmFolder
from mixtera_hpc.swarm.tables import SwarmTable, read_table

__all__ = ["EarlierSwarm", "open_earlier"]

COMPARED = ("dataplane", "training")
"""Groups whose values must be equal, so that losses of both swarms can be compared."""
NOT_COMPARED = ("comm", "workers", "audit", "watchdog", "watchdog_s")
"""Keys in them that change no loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierSwarm:
    """A finished swarm over some of the domains of a new one."""

    name: str
    names: tuple[str, ...]
    """Names of its domains."""
    proposal: NDArray[np.float64]
    """Mixture that the swarm proposed; shape (K,)."""
    ratios: SwarmTable
    metrics: SwarmTable

    def grouped(self, space: MixtureSpace) -> MixtureSpace:
        """Return `space` with the earlier domains as one group, whose shares inside are those of the proposal.

        Raises:
            MixtureError: an earlier domain is missing, no domain is new, or the bounds leave no mixture.
        """
        if space.num_phases > 1:
            raise MixtureError(
                f"swarm.phases has {space.num_phases} phases, but the proposal of {self.name} is one mixture for a "
                "whole run, whose ratios --reuse keeps.\n  Set swarm.phases=[1], or sample without --reuse."
            )
        missing = [name for name in self.names if name not in space.names]
        if missing:
            raise MixtureError(
                f"{missing[0]} is a domain of the earlier swarm {self.name}, but not of this one.\n"
                "  Only domains can be added with --reuse. Sample without it if domains were removed or changed."
            )
        new = [place for place, name in enumerate(space.names) if name not in self.names]
        if not new:
            raise MixtureError(
                f"The domains are those of the earlier swarm {self.name}, and --reuse is for domains that were added.\n"
                "  Sample into the folder of that swarm with a larger swarm.num_proxies to add proxies."
            )
        old = np.zeros(len(space.names))
        for name, share in zip(self.names, self.proposal.tolist(), strict=True):
            old[space.names.index(name)] = share
        basis = np.concatenate([old[None, :] / old.sum(), np.eye(len(space.names))[new]])

        # The group is as likely as its domains were together.
        together = 1 - float(space.prior[new].sum())
        is_new = np.isin(np.arange(len(space.names)), new)
        prior = np.where(is_new, space.prior, together * old / old.sum())
        grouped = MixtureSpace(names=space.names, prior=prior, low=space.low, high=space.high, basis=basis)
        grouped.check()
        return grouped


def open_earlier(folder: SwarmFolder, config: Config) -> EarlierSwarm:
    """Open a swarm that has a proposal.

    Args:
        folder: the folder of the earlier swarm.
        config: the configuration of the new swarm.

    Raises:
        DataError: there is no swarm, or it has no proposal yet.
        ConfigError: its proxies were trained with other settings, so that their losses mean something else.
    """
    record = folder.read()
    if not folder.proposal_record.is_file() or not folder.metrics.is_file():
        raise DataError(
            f"{folder.path} has no proposal yet.\n  Make it first: mixtera-hpc swarm fit {folder.path}, when its "
            "proxies have finished."
        )
    if record.num_phases > 1:
        raise ConfigError(
            f"{folder.path} has a mixture for each of {record.num_phases} phases, and --reuse keeps the ratios of one "
            "mixture.\n  Give a swarm of one phase, or sample without --reuse."
        )
    for group in COMPARED:
        before = _settings(record.config, group)
        after = _settings(config, group)
        changed = [
            key for key in after if before.get(key) != after[key] and not (key == "lanes" and after[key] is None)
        ]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{group}.{key} is {after[key]!r}, but {before.get(key)!r} in the earlier swarm, whose losses are "
                f"therefore not comparable.\n  Set {group}.{key}={before.get(key)}, or sample without --reuse."
            )
    proposal = parse_json(folder.proposal_record.read_text(encoding="utf-8"))
    return EarlierSwarm(
        name=folder.name,
        names=record.names,
        proposal=np.array(proposal["weights"], np.float64),
        ratios=read_table(folder.ratios),
        metrics=read_table(folder.metrics),
    )


def _settings(config: Config, group: str) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(getattr(config, group))
    return {key: value for key, value in plain.items() if key not in NOT_COMPARED}
