"""Skill-It: serve the domains whose training helps the domains with a high loss.

A graph says how much training on one domain helps another. The score of a domain is the sum of the losses of all
domains that it helps, over the last evaluations; weights are prior · exp(eta · score). The sum covers a fixed number of
evaluations, so nothing winds up. Price: one product of the graph with a vector per evaluation; a graph of 1,000 domains
takes 8 MB. Source: arXiv 2307.14430, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, StatisticsChoice, check_range
from mixtera_hpc.core.mixing.simple_algorithm import ArrayState, SimpleAlgorithm, Values
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["SkillIt"]


class SkillIt(SimpleAlgorithm):
    """The algorithm with its parameters."""

    name: ClassVar[str] = "skill-it"
    learned: ClassVar[tuple[str, ...]] = ("summed_loss",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of Skill-It."""

        graph: tuple[tuple[float, ...], ...] = ()
        """Row i, column j: how much training on domain i lowers the loss of domain j. A list of lists in the order of
        the domains, a mapping `{trained: {helped: number}}` of domain names, or the path of a JSON file with such a
        mapping, in which a domain helps itself by 1. Empty: every domain helps only itself."""
        eta: float = 0.2
        """Step size per nat."""
        window: int = 3
        """Evaluations whose losses are summed."""
        statistics: StatisticsChoice = "heldout"
        """The losses to learn from: `heldout` losses, or the losses of `train` steps."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            check_range("eta", self.eta, 0)
            check_range("window", self.window, 1, 1000)
            for name in ("delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._graph = np.array(config.graph) if config.graph else None

    def begin(self, prior: NDArray[np.float64]) -> Values:
        """Return the values that a run begins with.

        Raises:
            ConfigError: the graph does not have one row and one column per domain.
        """
        size = len(prior)
        if self.config.graph and {size} != {len(self.config.graph), *map(len, self.config.graph)}:
            raise ConfigError(
                f"{CONFIG_KEY}.graph has {len(self.config.graph)} rows, but the mixture has {size} domains. Give one "
                "row and one column per domain, in the order of the mixture."
            )
        return {"window": np.full((self.config.window, size), np.nan), "summed_loss": np.zeros(size)}

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, NDArray[np.float64]]:
        """Return the losses of the newest evaluations, and the weights that follow from them."""
        old = state.values["window"]
        # A domain that is absent keeps its last loss. Row 0 is the newest evaluation; NaN counts as no evaluation.
        newest = np.where(statistics.observed, statistics.loss_mean, old[0])
        window = np.concatenate([newest[None], old[:-1]])
        summed = np.nansum(window, axis=0)
        score = summed if self._graph is None else self._graph @ summed
        exponent = self.config.eta * score
        return {"window": window, "summed_loss": summed}, state.prior * np.exp(exponent - exponent.max())
