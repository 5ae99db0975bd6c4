"""The metrics of every domain under the names that all integrations log."""

from collections.abc import Sequence

import numpy as np

from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["domain_losses"]


def domain_losses(statistics: Sequence[DomainStatistics], names: Sequence[str], prefix: str) -> dict[str, float]:
    """Return the mean loss of every observed domain over some steps, in nats per token, as `{prefix}/{name}`.

    Args:
        statistics: of the steps to average over; one entry for a validation.
        names: of every domain, by domain_id.
        prefix: `train_loss` or `held_out_loss`.
    """
    if not statistics:
        return {}
    loss_sum = np.sum([of_step.loss_sum for of_step in statistics], axis=0)
    num_tokens = np.sum([of_step.num_tokens for of_step in statistics], axis=0)
    observed = np.flatnonzero(num_tokens).tolist()
    return {f"{prefix}/{names[i]}": float(loss_sum[i] / num_tokens[i]) for i in observed}
