"""Aioli: measure how much each domain helps every other one in short bursts of forced mixtures, then follow the result.

A round has `round_updates` evaluations. At its beginning every domain in turn gets most of the mixture for the time
between two evaluations, `sweeps` times. The fall of every loss in that time is a linear function of the mixture that
was in force; a least-squares fit over the round gives the matrix A, where A[i, j] is the fall of loss i by training on
domain j. At the end of the round, w = w · exp(eta · sum_i A[i, j]) / sum, with A scaled to [0, 1].

The planner serves the bursts: set `training.validate_every` to a multiple of `dataplane.chunk_steps`, best to the same
number, so that a burst is one chunk. The fit uses the mixture that was in force, so the lag between a decision and the
chunk that it holds for needs no correction. Price: two K x K sums per evaluation, one K x K solution per round.
Source: arXiv 2411.05735, algorithms 1 and 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, StatisticsChoice, check_range
from mixtera_hpc.core.mixing.simple_algorithm import ArrayState, SimpleAlgorithm, Values
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["Aioli"]

RIDGE = 1e-6
"""Added to the diagonal of the normal equations, relative to their mean diagonal: a round may have served too few
different mixtures."""


class Aioli(SimpleAlgorithm):
    """The algorithm with its parameters."""

    name: ClassVar[str] = "aioli"
    learned: ClassVar[tuple[str, ...]] = ("last_loss",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of Aioli."""

        eta: float = 0.5
        """Step size of a round."""
        sweeps: int = 1
        """Bursts of each domain per round."""
        round_updates: int | None = None
        """Evaluations of a round, bursts included. Null means four times the number of bursts."""
        smoothing: float = 0.75
        """Share of a forced mixture that is distributed evenly; the rest goes to one domain."""
        statistics: StatisticsChoice = "heldout"
        """The losses to learn from: `heldout` losses, or the losses of `train` steps, which are noisier."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            check_range("eta", self.eta, 0)
            check_range("sweeps", self.sweeps, 1)
            if self.round_updates is not None:
                check_range("round_updates", self.round_updates, 2)
            for name in ("smoothing", "delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)

    def begin(self, prior: NDArray[np.float64]) -> Values:
        """Return the values that a run begins with.

        Raises:
            ConfigError: a round is too short for its bursts.
        """
        size = len(prior)
        bursts = self.config.sweeps * size
        if self.config.round_updates is not None and self.config.round_updates <= bursts:
            raise ConfigError(
                f"{CONFIG_KEY}.round_updates is {self.config.round_updates}, but {size} domains × sweeps="
                f"{self.config.sweeps} need {bursts} bursts. Set it above {bursts}, or leave it out."
            )
        return {
            "base_weight": prior,
            "last_loss": np.full(size, np.nan),
            "mixture_products": np.zeros((size, size)),
            "fall_products": np.zeros((size, size)),
            "influence": np.zeros(size),
        }

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, NDArray[np.float64]]:
        """Add the falls of the losses to the fit, and return the mixture of the next burst, or of the round."""
        values = dict(state.values)
        served = state.weights if statistics.weights is None else statistics.weights
        fall = values["last_loss"] - statistics.loss_mean
        values["last_loss"] = np.where(statistics.observed, statistics.loss_mean, values["last_loss"])
        if np.isfinite(fall).any():
            # A domain without a loss before and after adds nothing to its row of A.
            values["mixture_products"] = values["mixture_products"] + np.outer(served, served)
            values["fall_products"] = values["fall_products"] + np.outer(np.nan_to_num(fall), served)

        size = len(state.weights)
        round_updates = self.config.round_updates or 4 * self.config.sweeps * size
        position = state.step % round_updates
        if position == 0 and state.step:
            values |= self._end_round(values)
        if position < self.config.sweeps * size:
            forced = np.full(size, self.config.smoothing / size)
            forced[position % size] += 1 - self.config.smoothing
            return values, forced
        return values, values["base_weight"]

    def _end_round(self, values: Values) -> Values:
        """Solve for A, move the weights, and begin a new fit."""
        products = values["mixture_products"]
        size = len(products)
        ridge = RIDGE * max(float(np.trace(products)) / size, np.finfo(np.float64).tiny) * np.eye(size)
        influence = np.linalg.solve(products + ridge, values["fall_products"].T).T
        span = influence.max() - influence.min()
        scaled = (influence - influence.min()) / span if span > 0 else np.zeros_like(influence)
        column = scaled.sum(axis=0)
        raised = values["base_weight"] * np.exp(self.config.eta * (column - column.max()))
        return {
            "base_weight": raised / raised.sum(),
            "influence": column,
            "mixture_products": np.zeros_like(products),
            "fall_products": np.zeros_like(products),
        }
