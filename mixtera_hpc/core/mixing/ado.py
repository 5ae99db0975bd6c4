"""Adaptive Data Optimization: serve more of the domains whose loss falls fastest, by their own scaling laws.

In every step, credit follows the shares that were served, and the preference is prior × credit × speed. The mixture is
the average of all preferences so far, moved a tenth of the way towards the present preference. Every `refit_interval`
steps the laws are fitted again. Price at 1,000 domains: a fraction of a millisecond per step, a fraction of a second
per refit, and 4 MB of history, no matter how long the run is.

The published codes have faults that this code does not have: a floor under epsilon that makes low-entropy domains look
fully learned; one NaN ends all refits; a floor so high that many domains become uniform, and weights that end below it;
zeros in place of missing losses; one failed fit discards the others; cost that grows with the run; an optimizer that
stops where it starts; int32 counts. Source: arXiv 2410.11820, equations (1) to (5).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.ado_variants import ADO_VARIANTS
from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.laws.law_averaging import average_exponents
from mixtera_hpc.core.mixing.laws.law_objective import bounds_reached, rms_residual
from mixtera_hpc.core.mixing.laws.loss_history import LossHistory
from mixtera_hpc.core.mixing.laws.loss_series import LossSeries
from mixtera_hpc.core.mixing.laws.scaling_law import ScalingLaws, fit_laws
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, check_origin, check_prior, check_range
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["LAW_FITTED", "LAW_OLDER", "LAW_UNKNOWN", "Ado", "AdoState"]

LAW_UNKNOWN = 0
"""The domain has no law yet: too few points."""
LAW_FITTED = 1
"""The law was fitted in the last refit."""
LAW_OLDER = 2
"""The law is older: the domain had no new losses in the last refit, or its fit failed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdoState:
    """The state of ADO after `step` updates; arrays have shape (num_domains,)."""

    step: int
    prior: NDArray[np.float64]
    """mu: the mixture that the run started with."""
    weights: NDArray[np.float64]
    """pi: the present mixture."""
    credit: NDArray[np.float64]
    """h: moving average of the served shares."""
    average: NDArray[np.float64]
    """pi bar: average of all preferences so far."""
    laws: ScalingLaws
    """The laws that fit best."""
    averaged: ScalingLaws
    """The laws that speeds are computed from: with averaged exponents, or equal to `laws` (`AdoVariant.averages`)."""
    residual: NDArray[np.float64]
    """Root mean square of log(predicted loss) - log(observed loss) over the points of the last fit; NaN without one."""
    law_status: NDArray[np.int8]
    """LAW_UNKNOWN, LAW_FITTED or LAW_OLDER."""
    stale: NDArray[np.bool_]
    """Domains with new losses since the last refit."""
    num_sequences: NDArray[np.int64]
    """Sequences of each domain seen so far; their sum is n."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""
    history: LossHistory | LossSeries

    @property
    def num_seen(self) -> int:
        """n: sequences of all domains seen so far."""
        return int(self.num_sequences.sum())


class Ado:
    """The algorithm with its parameters; everything that changes is in `AdoState`."""

    name: ClassVar[str] = "ado"
    learned: ClassVar[tuple[str, ...]] = ("epsilon", "beta", "alpha")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of ADO, with the defaults of the paper."""

        variant: Literal["default", "paper", "authors", "authors-first", "mixtera"] = "default"
        """`default`: the equations of the paper, with the known errors of published code fixed. Its speeds are those of
        laws whose exponents lie halfway between the best fit and the mean of all exponents that fit the losses. The
        others reproduce the paper (arXiv 2410.11820), the code of its `authors`, their first commit (`authors-first`,
        which they corrected), or the code of `mixtera` (arXiv 2502.19790)."""
        warmup: int = 1000
        """Steps before the mixture begins to change."""
        refit_interval: int = 1000
        """Steps between fits of the scaling laws; the first fit is at the end of the warm-up."""
        first_fitted_step: int | None = None
        """Losses of earlier steps are not fitted. Null means half of the warm-up."""
        credit_rate: float = 0.1
        """gamma_1: how fast credit follows the served shares."""
        mixture_rate: float = 0.1
        """gamma_2: how far the mixture moves from the average preference towards the present one."""
        credit_power: float = 0.5
        """s: the exponent of credit; 0 ignores what was served."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            check_range("warmup", self.warmup, 0)
            check_range("refit_interval", self.refit_interval, 1)
            check_range("first_fitted_step", self.first_fitted, 0)
            check_range("credit_power", self.credit_power, 0)
            for name in ("credit_rate", "mixture_rate", "delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)
            if self.first_fitted > self.warmup:
                raise ConfigError(
                    f"{CONFIG_KEY}.first_fitted_step is {self.first_fitted}, after the warm-up of {self.warmup} steps, "
                    "but the first fit is at its end.\n"
                    f"  Set {CONFIG_KEY}.first_fitted_step below {CONFIG_KEY}.warmup, or leave it out."
                )

        @property
        def first_fitted(self) -> int:
            """The first step whose losses are fitted."""
            return self.warmup // 2 if self.first_fitted_step is None else self.first_fitted_step

    def __init__(self, config: Config) -> None:
        self.config = config
        self.variant = ADO_VARIANTS[config.variant]

    def floor(self, num_domains: int) -> float:
        """Return the lower bound of every weight after the warm-up; 0 for variants without an exact floor."""
        if self.variant.floor != "exact":
            return 0.0
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> AdoState:
        """Return the initial state; the mixture `prior` is served until the end of the warm-up."""
        prior = check_prior(prior)
        size = len(prior)
        history: LossHistory | LossSeries = LossHistory(num_domains=size)
        if not self.variant.binned:
            history = LossSeries(num_domains=size, first_fitted=self.config.first_fitted)
        return AdoState(
            step=0,
            prior=prior,
            weights=prior,
            credit=prior,
            average=prior,
            laws=ScalingLaws.unknown(size),
            averaged=ScalingLaws.unknown(size),
            residual=np.full(size, np.nan),
            law_status=np.full(size, LAW_UNKNOWN, np.int8),
            stale=np.zeros(size, np.bool_),
            num_sequences=np.zeros(size, np.int64),
            num_nonfinite=np.zeros(size, np.int64),
            history=history,
        )

    def update(self, state: AdoState, statistics: DomainStatistics) -> tuple[AdoState, NDArray[np.float64]]:
        """Return the state after one more optimizer step, and the mixture; shape (num_domains,)."""
        share = _share(statistics)
        state = self._observe(state, statistics)
        steps_after_warmup = state.step - self.config.warmup
        # The first fit is at the end of the warm-up, so that the mixture has laws when it begins to move.
        if steps_after_warmup >= 0 and steps_after_warmup % self.config.refit_interval == 0:
            state = self._refit(state)
        if steps_after_warmup >= 0 and state.laws.known.any():
            state = self._update_mixture(state, share)
        elif self.variant.credit_in_warmup:
            state = replace(state, credit=self._follow(state.credit, share))
        return replace(state, step=state.step + 1), state.weights

    def describe(self, state: AdoState) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows; shape (num_domains,) each."""
        # The residual and the bounds are those of the best fit: they show what the losses do not determine.
        best = {"best_beta": state.laws.beta, "best_alpha": state.laws.alpha} if self.variant.averages else {}
        return {
            "weight": state.weights,
            "credit": state.credit,
            "epsilon": state.averaged.epsilon,
            "beta": state.averaged.beta,
            "alpha": state.averaged.alpha,
            "speed": state.averaged.speed(max(state.num_seen, 1), self.variant.min_alpha),
            **best,
            "residual": state.residual,
            "law_status": state.law_status,
            "law_bounds": bounds_reached(state.laws.theta, self.variant.bounds),
            "num_sequences": state.num_sequences,
            "num_nonfinite": state.num_nonfinite,
        }

    def state_arrays(self, state: AdoState) -> dict[str, NDArray[Any]]:
        """Return the state as flat arrays, for an npz file without pickle."""
        per_domain = {name: getattr(state, name) for name in _PER_DOMAIN}
        scalars = {"origin": np.array(self._origin), "step": np.array(state.step)}
        laws = {"theta": state.laws.theta, "law_unit": np.array(state.laws.unit)}
        if self.variant.averages:
            laws["averaged_theta"] = state.averaged.theta
        return {**scalars, **per_domain, **laws, **state.history.arrays()}

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> AdoState:
        """Restore what `state_arrays` returned.

        Raises:
            ConfigError: another algorithm or variant wrote the arrays.
        """
        check_origin(arrays, self._origin)
        history = LossHistory if self.variant.binned else LossSeries
        unit = float(arrays["law_unit"])
        return AdoState(
            step=int(arrays["step"]),
            laws=ScalingLaws(theta=arrays["theta"], unit=unit),
            averaged=ScalingLaws(theta=arrays["averaged_theta" if self.variant.averages else "theta"], unit=unit),
            history=history.from_arrays(arrays),
            **{name: arrays[name] for name in _PER_DOMAIN},
        )

    @property
    def _origin(self) -> str:
        return f"{self.name} variant={self.config.variant}"

    def _observe(self, state: AdoState, statistics: DomainStatistics) -> AdoState:
        """Count the sequences of a step, and add its losses to the history."""
        observed = statistics.observed
        is_first = state.num_seen == 0
        state = replace(
            state,
            num_sequences=state.num_sequences + statistics.num_sequences,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
        )
        if is_first and self.variant.binned and state.num_seen:
            # n is counted in batches, so laws do not depend on what counts as a sequence.
            unit = float(state.num_seen)
            laws = replace(state.laws, unit=unit)
            state = replace(state, laws=laws, averaged=replace(state.averaged, unit=unit))
        # The smoothing filter of the series needs the early steps too; it drops them after smoothing.
        if not observed.any() or (self.variant.binned and state.step < self.config.first_fitted):
            return state
        history = state.history.observe(state.num_seen / state.laws.unit, statistics)
        return replace(state, history=history, stale=state.stale | observed)

    def _refit(self, state: AdoState) -> AdoState:
        """Fit the laws of all domains with new losses. Where a fit fails, the old law stays."""
        fitted = np.zeros_like(state.stale)
        laws = state.laws
        averaged = state.averaged
        residual = state.residual
        # Domains without new losses would give the same law again.
        rows = np.flatnonzero(state.stale)
        if len(rows):
            new = np.full_like(laws.theta, np.nan)
            points = state.history.points().take(rows)
            new[rows] = fit_laws(points, self.variant.bounds, ScalingLaws(theta=laws.theta[rows])).theta
            fitted = ScalingLaws(theta=new).known
            laws = replace(laws, theta=np.where(fitted[:, None], new, laws.theta))
            mean = new.copy()
            if self.variant.averages:
                mean[rows] = average_exponents(new[rows], points, self.variant.bounds)
            averaged = replace(averaged, theta=np.where(fitted[:, None], mean, averaged.theta))
            residual = residual.copy()
            residual[rows] = np.where(fitted[rows], rms_residual(new[rows], points), residual[rows])
        # A law of NaN is a failed fit; its domain keeps the law it had.
        older = np.where(laws.known, LAW_OLDER, LAW_UNKNOWN)
        status = np.where(fitted, LAW_FITTED, older).astype(np.int8)
        return replace(
            state,
            laws=laws,
            averaged=averaged,
            residual=residual,
            law_status=status,
            stale=np.zeros_like(state.stale),
        )

    def _update_mixture(self, state: AdoState, share: NDArray[np.float64] | None) -> AdoState:
        """Apply equations (2) to (5): credit, preference, mixture and average preference."""
        rule = self.variant
        rate = self.config.mixture_rate
        followed = {"realised": share, "previous": state.weights, "new": None}[rule.share]
        credit = self._follow(state.credit, followed)
        preference = self._preference(state, credit)
        weights = self._with_floor(rate * preference + (1 - rate) * state.average, state)
        # One published code lets credit follow the weights that it has just computed.
        if rule.share == "new":
            credit = self._follow(credit, weights)
        # Running average of preferences over all steps; the prior stands for those of the warm-up.
        newest = 1.0 / (state.step + rule.first_step + 1)
        average = newest * preference + (1 - newest) * state.average
        return replace(state, weights=weights, credit=credit, average=average)

    def _follow(self, credit: NDArray[np.float64], share: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Return the moving average of served shares after one more step; unchanged if the batch was empty."""
        rate = self.config.credit_rate
        return credit if share is None else rate * share + (1 - rate) * credit

    def _preference(self, state: AdoState, credit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rho, the preference: prior × credit × speed, sum 1; the prior if all of them are 0.

        A domain without a law gets the mean speed of the others, weighted by the prior.
        """
        rule = self.variant
        known = state.laws.known
        speed = state.averaged.speed(state.num_seen, rule.min_alpha)
        # `tiny` avoids a division by 0 if no domain with a law has a prior.
        measured = state.prior * known
        typical = (measured * np.where(known, speed, 0.0)).sum() / max(measured.sum(), np.finfo(np.float64).tiny)

        factor = np.sqrt(credit * (1 - credit)) if rule.credit == "spread" else credit**self.config.credit_power
        preference = state.prior * factor * np.where(known, speed, typical)
        total = preference.sum()
        preference = preference / total if total > 0 else state.prior
        return _clip_to_floor(preference, self.config.delta_min) if rule.floor == "preference" else preference

    def _with_floor(self, weights: NDArray[np.float64], state: AdoState) -> NDArray[np.float64]:
        """Return `weights` with the floor of the variant, sum 1."""
        if self.variant.floor == "exact":
            return project_to_bounds(weights, self.floor(len(weights)))
        if self.variant.floor == "seen":
            return _clip_to_floor(weights, np.where(state.num_sequences > 0, self.config.delta_min, 0.0))
        return weights / float(weights.sum())


_PER_DOMAIN = (
    "prior",
    "weights",
    "credit",
    "average",
    "residual",
    "law_status",
    "stale",
    "num_sequences",
    "num_nonfinite",
)


def _share(statistics: DomainStatistics) -> NDArray[np.float64] | None:
    """Return the shares of the domains in the batch; None for an empty batch."""
    total = statistics.num_sequences.sum()
    return statistics.num_sequences / total if total > 0 else None


def _clip_to_floor(weights: NDArray[np.float64], floor: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Raise weights to the floor and renormalise, as the published codes do; the result may lie below the floor."""
    raised = np.maximum(weights, floor)
    return raised / float(raised.sum())
