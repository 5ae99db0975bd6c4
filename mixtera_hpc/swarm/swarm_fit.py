"""Fit a swarm: gather its tables, validate the regressions, choose one, and propose a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.errors import ConfigError, DataError, did_you_mean
from mixtera_hpc.swarm.cross_validation import (
    Validated,
    choose_laws,
    constant_rmse,
    mean_loss,
    validate_regressions,
)
from mixtera_hpc.swarm.mixture_file import written_weights
from mixtera_hpc.swarm.proposal import Uncertainty, estimate_uncertainty, propose_mixture
from mixtera_hpc.swarm.regression import LAWS, MetricFits
from mixtera_hpc.swarm.swarm_folder import SwarmFolder, SwarmRecord
from mixtera_hpc.swarm.swarm_runs import SwarmRuns
from mixtera_hpc.swarm.tables import SwarmTable, check_ratios, join_tables, read_table, table_text
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["MeasuredRuns", "SwarmFit", "finite_or_none", "fit_swarm", "range_curves"]

Array = NDArray[np.float64]
Row = dict[str, float]
"""Metric → its value, of one run."""

EDGE = 1e-5
"""Shares that differ by less are equal: files have six decimals."""
MIN_RUNS = 6
"""Fewer measured runs are refused: a cross-validated error of them means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRuns:
    """The runs that a fit is made from: N runs, M metrics, C = P × K shares of K domains in P phases."""

    runs: tuple[str, ...]
    """Names of the measured runs."""
    mixtures: Array
    """Shape (N, C)."""
    metrics: tuple[str, ...]
    losses: Array
    """Shape (N, M), NaN where a run lacks a metric."""
    objective: Array
    """Weights of the metrics; shape (M,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwarmFit:
    """The result of a fit."""

    record: SwarmRecord
    measured: MeasuredRuns
    num_unfinished: int
    """Proxies without losses."""
    validated: tuple[Validated, ...]
    """All laws that were tried."""
    chosen: Validated
    """The best law of every metric."""
    constant_rmse: float
    """Error of predicting the mean, for comparison."""
    fit: MetricFits
    """The chosen laws, fitted to all runs."""
    checks: SwarmRuns
    """Runs with the natural mixture, the uniform mixture and the proposal, in this order."""
    check_losses: SwarmTable
    """Held-out losses of the checks that have finished."""
    predicted: Array
    """Predicted objective of each check, in nats; shape (3,)."""
    uncertainty: Uncertainty
    """Uncertainty of the predictions for the proposal, the natural and the uniform mixture, in this order."""

    @property
    def proposal(self) -> Array:
        """The proposed mixture; shape (C,)."""
        proposed: Array = self.checks.mixtures[-1]
        return proposed

    def measured_check(self, place: int) -> float | None:
        """Return the measured objective of check number `place`; None if it has not finished, or lacks a metric."""
        name = self.checks.names[place]
        if name not in self.check_losses.runs:
            return None
        row = join_tables([self.check_losses], self.measured.metrics, np.nan).rows_of([name])[0]
        return finite_or_none(float(mean_loss(row, self.measured.objective)))

    def at_edge(self) -> list[int]:
        """Return the shares that end at the measured range in the proposal, though the bounds would allow more."""
        low = self.measured.mixtures.min(axis=0)
        high = self.measured.mixtures.max(axis=0)
        below = (self.proposal <= low + EDGE) & (low > self.record.low + EDGE)
        above = (self.proposal >= high - EDGE) & (high < self.record.high - EDGE)
        return np.flatnonzero(below | above).tolist()

    def to_plain(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        return {
            "domains": list(self.record.names),
            "phases": self.record.phases.tolist(),
            "weights": self._weights(self.proposal),
            "regression": {
                metric: {"law": law.name, "ridge": ridge, "cross_validated_rmse": rmse}
                for metric, law, ridge, rmse in zip(
                    self.measured.metrics,
                    self.chosen.laws,
                    self.chosen.ridge.tolist(),
                    self.chosen.metric_rmse.tolist(),
                    strict=True,
                )
            },
            "num_runs": len(self.measured.runs),
            "objective": dict(zip(self.measured.metrics, self.measured.objective.tolist(), strict=True)),
            "cross_validated_rmse": {candidate.laws[0].name: candidate.rmse for candidate in self.validated},
            "chosen_rmse": self.chosen.rmse,
            "constant_rmse": self.constant_rmse,
            "rank_correlation": finite_or_none(self.chosen.rank_correlation),
            "checks": [
                {
                    "run": name,
                    "weights": self._weights(self.checks.mixtures[place]),
                    "predicted": float(self.predicted[place]),
                    "measured": self.measured_check(place),
                }
                for place, name in enumerate(self.checks.names)
            ],
            "predicted_deviation": finite_or_none(float(self.uncertainty.deviation[0])),
            "gain_probability": {
                "natural": finite_or_none(float(self.uncertainty.gain_probability[1])),
                "uniform": finite_or_none(float(self.uncertainty.gain_probability[2])),
            },
        }

    def _weights(self, mixture: Array) -> list[Any]:
        """Return the shares of the domains; with several phases, a list of them for each."""
        rows: list[Any] = by_phase(mixture, self.record.num_phases).tolist()
        return rows if len(rows) > 1 else rows[0]


def fit_swarm(folder: SwarmFolder, settings: SwarmConfig, outside: Sequence[tuple[Path, Path]] = ()) -> SwarmFit:
    """Fit the finished proxies of a swarm and rows of other tables; write `metrics.csv`.

    Args:
        folder: the swarm.
        settings: regression, objective and penalty; the other settings were used when it was sampled.
        outside: pairs of a ratios.csv and a metrics.csv of other tools. Their metrics replace those of the same run.

    Raises:
        DataError: a table is damaged, or too few runs are measured.
        ConfigError: the objective names a metric that no run has.
    """
    record = folder.read()
    proxies = SwarmRuns.proxies(folder, record)
    measured = _measured_runs(folder, settings, proxies, outside)
    mixtures = measured.mixtures
    losses = measured.losses
    objective = measured.objective

    laws = LAWS if settings.regression == "auto" else (settings.regression,)
    validated = validate_regressions(mixtures, losses, objective, tuple(laws))
    chosen = choose_laws(validated, losses, objective)
    fit = chosen.fit(mixtures, losses)
    proposal = propose_mixture(record.space, fit, mixtures, objective, settings.penalty)
    proposal = written_weights(proposal, record.num_phases)
    checks = SwarmRuns.checks(folder, record, proposal)
    return SwarmFit(
        record=record,
        measured=measured,
        num_unfinished=len(proxies.names) - sum(name in measured.runs for name in proxies.names),
        validated=tuple(validated),
        chosen=chosen,
        constant_rmse=constant_rmse(losses, objective),
        fit=fit,
        checks=checks,
        check_losses=checks.losses(),
        predicted=mean_loss(fit.predict(checks.mixtures), objective),
        # The first candidate is the one that the others are compared with.
        uncertainty=estimate_uncertainty(chosen, mixtures, losses, objective, checks.mixtures[[2, 0, 1]]),
    )


def _measured_runs(
    folder: SwarmFolder, settings: SwarmConfig, proxies: SwarmRuns, outside: Sequence[tuple[Path, Path]]
) -> MeasuredRuns:
    """Collect the losses of the proxies, and add the rows of other tables."""
    own = proxies.losses()
    folder.write(folder.metrics, table_text(own))
    ratios, metrics = _gather(folder, proxies, own, outside)
    columns, objective = _objective(settings, metrics)
    used = {run: row for run, row in metrics.items() if not row.keys().isdisjoint(columns)}
    return MeasuredRuns(
        runs=tuple(used),
        mixtures=np.array([ratios[run] for run in used]),
        metrics=tuple(columns),
        losses=_loss_array(folder, used, columns),
        objective=objective,
    )


def _gather(
    folder: SwarmFolder, proxies: SwarmRuns, own: SwarmTable, outside: Sequence[tuple[Path, Path]]
) -> tuple[dict[str, Array], dict[str, Row]]:
    """Return the mixture and the metrics of every run, by its name."""
    pairs = list(outside)
    if folder.earlier_ratios.exists():
        pairs.insert(0, (folder.earlier_ratios, folder.earlier_metrics))
    ratios: dict[str, Array] = dict(zip(proxies.names, proxies.mixtures, strict=True))
    metrics = _rows(own)
    for ratios_path, metrics_path in pairs:
        table = check_ratios(ratios_path, read_table(ratios_path), proxies.record.columns, proxies.record.num_phases)
        for run, mixture in zip(table.runs, table.values, strict=True):
            if run in ratios and not np.allclose(ratios[run], mixture, atol=1e-4):
                raise DataError(
                    f"{ratios_path} gives run {run!r} another mixture than this swarm does.\n  Rename the run."
                )
            ratios.setdefault(run, mixture)
        rows = _rows(read_table(metrics_path))
        unknown = [run for run in rows if run not in ratios]
        if unknown:
            raise DataError(
                f"{metrics_path} has run {unknown[0]!r}, whose mixture is not known."
                f"{did_you_mean(unknown[0], list(ratios))}\n  Add it to {ratios_path}."
            )
        for run, row in rows.items():
            metrics[run] = {**metrics.get(run, {}), **row}
    return ratios, metrics


def _rows(table: SwarmTable) -> dict[str, Row]:
    return {
        run: {name: value for name, value in zip(table.columns, row, strict=True) if np.isfinite(value)}
        for run, row in zip(table.runs, table.values.tolist(), strict=True)
    }


def _objective(settings: SwarmConfig, metrics: Mapping[str, Row]) -> tuple[list[str], Array]:
    """Return the metrics that count, and their weights."""
    known = list(dict.fromkeys(name for row in metrics.values() for name in row))
    if not settings.objective:
        return known, np.ones(len(known))
    for name in settings.objective:
        if name not in known and known:
            raise ConfigError(
                f"swarm.objective names {name!r}, but no run has this metric.{did_you_mean(name, known)}\n"
                f"  The metrics are {', '.join(known[:10])}."
            )
    columns = [name for name, weight in settings.objective.items() if weight > 0]
    return columns, np.array([settings.objective[name] for name in columns])


def _loss_array(folder: SwarmFolder, metrics: Mapping[str, Row], columns: Sequence[str]) -> Array:
    """Return the metrics of all runs as an array, shape (N, M); refuse too few runs, and values of at most 0."""
    runs = list(metrics)
    losses = np.array([[row.get(name, np.nan) for name in columns] for row in metrics.values()], np.float64)
    if len(runs) < MIN_RUNS:
        raise DataError(
            f"{len(runs)} runs of the swarm {folder.name} have losses, and at least {MIN_RUNS} are needed.\n"
            f"  Train its proxies with mixtera-hpc swarm train {folder.path} (or submit), or add tables with --ratios "
            "and --metrics."
        )
    low = losses <= 0  # False for NaN.
    if low.any():
        row, column = (int(place[0]) for place in np.nonzero(low))
        raise DataError(
            f"Metric {columns[column]!r} of run {runs[row]!r} is {losses[row, column]:g}, but the regressions are of "
            "losses above 0, where smaller is better.\n  Give losses (or bits per byte), or leave the column out."
        )
    return losses


def finite_or_none(value: float) -> float | None:
    """Return `value`; None if it is NaN or infinite, which JSON cannot hold."""
    return value if np.isfinite(value) else None


def range_curves(fit: SwarmFit, num_points: int) -> tuple[Array, Array]:
    """Return how the predicted objective changes with every share; shapes (C, points) each.

    The other domains of the phase keep their ratios in the proposal. Shares cover the measured range.
    """
    shares = np.linspace(fit.measured.mixtures.min(axis=0), fit.measured.mixtures.max(axis=0), num_points, axis=1)
    values = np.empty_like(shares)
    size = len(fit.record.names)
    for place in range(len(fit.proposal)):
        phase = slice(place // size * size, place // size * size + size)
        # A proposal of one domain says nothing about the ratios of the others.
        others = fit.proposal[phase] if fit.proposal[place] < 1 else fit.record.prior[phase] + 1e-9
        others = np.where(np.arange(size) == place % size, 0.0, others)
        mixtures = np.tile(fit.proposal, (num_points, 1))
        mixtures[:, phase] = (1 - shares[place])[:, None] * others / others.sum()
        mixtures[:, place] = shares[place]
        values[place] = mean_loss(fit.fit.predict(mixtures), fit.measured.objective)
    return shares, values
