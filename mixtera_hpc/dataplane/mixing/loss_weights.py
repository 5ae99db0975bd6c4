"""Objective weights: a factor on the loss of each domain, apart from how often the domain is served.

Recorded losses stay as they are: mixing algorithms and reports see the loss without the factor.
"""

from dataclasses import replace

import numpy as np

from mixtera_hpc.config.mixture.domain_tree import domain_entries
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import ConfigError

__all__ = ["LossWeights", "describe_loss_weight", "refuse_loss_weights"]


class LossWeights:
    """The factors of `mixture.domains[i].loss_weight`."""

    def __init__(self, mixture: MixtureConfig, num_domains: int) -> None:
        """Take the factors of the domains of a run."""
        written = [entry.domain.loss_weight for entry in domain_entries(mixture)] or [None] * num_domains
        self._factors = np.array([1.0 if weight is None else weight for weight in written], np.float32)
        self._are_equal = all(weight in (None, 1.0) for weight in written)

    def apply(self, batch: Batch) -> Batch:
        """Return the batch with `loss_weights`; unchanged if all factors are 1."""
        if self._are_equal:
            return batch
        factors = np.where(batch.is_padding, np.float32(0), self._factors[batch.domain_ids])
        return replace(batch, loss_weights=factors)


def describe_loss_weight(mixture: MixtureConfig) -> str | None:
    """Return the first `loss_weight` that is a factor other than 1, as it is written; None without one."""
    for entry in domain_entries(mixture):
        weight = entry.domain.loss_weight
        if weight not in (None, 1.0):
            return f"{entry.path}.loss_weight is {weight}"
    return None


def refuse_loss_weights(mixture: MixtureConfig, trainer: str) -> None:
    """Raise ConfigError if a domain has a factor, which `trainer` does not multiply the loss with."""
    if (written := describe_loss_weight(mixture)) is not None:
        raise ConfigError(
            f"{written}, but {trainer} does not multiply the loss with it.\n"
            "  Remove it. To train with such factors, use the reference trainer, or multiply the losses by "
            "batch.loss_weights in a loop of your own on DataPlane."
        )
