"""Loss-proportional mixing: the higher the loss of a domain, the more of it is served. A baseline.

Weights are proportional to (S/N)^power, the mean token loss of the newest step, or to exp(loss / temperature). A domain
that is absent from a step keeps its last loss. Price: O(domains) per step, no history.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.parameters import StatisticsChoice, check_range
from mixtera_hpc.core.mixing.simple_algorithm import ArrayState, SimpleAlgorithm, Values
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["LossProportional"]


class LossProportional(SimpleAlgorithm):
    """The algorithm with its parameters."""

    name: ClassVar[str] = "loss-proportional"
    learned: ClassVar[tuple[str, ...]] = ("last_loss",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of loss-proportional mixing."""

        power: float = 1.0
        """Exponent of the mean loss. Not used with a temperature."""
        temperature: float | None = None
        """Nats. With it, weights are a softmax of loss / temperature. Null takes the power."""
        statistics: StatisticsChoice = "train"
        """The losses to learn from: the losses of `train` steps, or `heldout` losses."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            check_range("power", self.power, 0)
            if self.temperature is not None:
                check_range("temperature", self.temperature, 1e-6)
            for name in ("delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)

    def begin(self, prior: NDArray[np.float64]) -> Values:
        """Return the values that a run begins with: no loss is known."""
        return {"last_loss": np.full(len(prior), np.nan)}

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, NDArray[np.float64]]:
        """Return the newest losses, and the weights that follow from them."""
        loss = np.where(statistics.observed, statistics.loss_mean, state.values["last_loss"])
        known = np.isfinite(loss)
        if not known.any():
            return {"last_loss": loss}, state.prior
        # A domain that was never observed counts like the mean of the others.
        filled = np.maximum(np.where(known, loss, loss[known].mean()), 0.0)
        if self.config.temperature is None:
            return {"last_loss": loss}, filled**self.config.power
        return {"last_loss": loss}, np.exp((filled - filled.max()) / self.config.temperature)
