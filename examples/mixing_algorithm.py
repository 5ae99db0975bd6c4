"""A mixing algorithm of your own. Put the folder of this file on PYTHONPATH, then:

mixtera-hpc run experiment=demo mixture.algorithm=mixing_algorithm.LossTilt
mixtera-hpc mixture replay RUN --algorithm mixing_algorithm.LossTilt algorithm.strength=2.0
"""

from dataclasses import dataclass

import numpy as np

from mixtera_hpc.core.mixing.simple_algorithm import ArrayState, SimpleAlgorithm, Values
from mixtera_hpc.core.statistics import DomainStatistics


class LossTilt(SimpleAlgorithm):
    """Serve the domains in proportion to prior · exp(strength · mean loss)."""

    name = "loss-tilt"
    learned = ("mean_loss",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        strength: float = 0.5
        """Per nat."""

    def begin(self, prior: np.ndarray) -> Values:
        return {"mean_loss": np.zeros(len(prior))}

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, np.ndarray]:
        old = state.values["mean_loss"]
        mean_loss = np.where(statistics.observed, 0.9 * old + 0.1 * statistics.loss_mean, old)
        return {"mean_loss": mean_loss}, state.prior * np.exp(self.config.strength * (mean_loss - mean_loss.max()))
