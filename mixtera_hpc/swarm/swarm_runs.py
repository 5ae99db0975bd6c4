"""The runs of a swarm: their configurations as points of a sweep, and the held-out losses of the finished ones."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import DataError
from mixtera_hpc.launch.attempts import read_end
from mixtera_hpc.launch.sweep.sweep_plan import SweepPlan, plan_configs
from mixtera_hpc.swarm.mixture_file import written_weights
from mixtera_hpc.swarm.proposal import mixture_within, uniform_mixture
from mixtera_hpc.swarm.swarm_folder import SwarmFolder, SwarmRecord
from mixtera_hpc.swarm.tables import SwarmTable
from mixtera_hpc.track.event_reader import read_events

__all__ = ["NATURAL", "PROPOSAL", "UNIFORM", "SwarmRuns"]

NATURAL = "natural"
UNIFORM = "uniform"
PROPOSAL = "proposal"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwarmRuns:
    """Runs of a swarm that have a mixture each."""

    record: SwarmRecord
    names: tuple[str, ...]
    """Names of the runs, which are also their run ids."""
    mixtures: NDArray[np.float64]
    """Shape (runs, C)."""

    @classmethod
    def proxies(cls, folder: SwarmFolder, record: SwarmRecord) -> "SwarmRuns":
        """Return the sampled proxies."""
        names = folder.proxy_names(len(record.mixtures))
        return cls(record=record, names=tuple(names), mixtures=record.mixtures)

    @classmethod
    def checks(cls, folder: SwarmFolder, record: SwarmRecord, proposal: NDArray[np.float64]) -> "SwarmRuns":
        """Return the runs that check a proposal: natural mixture, uniform mixture and proposal, in this order."""
        space = record.space
        natural = mixture_within(space, record.natural)
        mixtures = written_weights(np.stack([natural, uniform_mixture(space), proposal]), space.num_phases)
        # Another proposal is another run. The other two stay.
        digest = hashlib.blake2b(mixtures[2].tobytes(), digest_size=3).hexdigest()
        names = (NATURAL, UNIFORM, f"{PROPOSAL}-{digest}")
        return cls(record=record, names=tuple(f"{folder.name}-{name}" for name in names), mixtures=mixtures)

    def configs(self) -> list[Config]:
        """Return the configuration of every run."""
        base = self.record.config
        return [
            replace(base, mixture=self.record.mixture_of(weights), run=replace(base.run, id=name))
            for name, weights in zip(self.names, self.mixtures, strict=True)
        ]

    def plan(self, max_parallel: int | None = None) -> SweepPlan:
        """Return the sweep over all runs: which are due, active or finished."""
        words = [[*self.record.overrides, f"mixture={name}"] for name in self.names]
        return plan_configs(self.configs(), words, max_parallel)

    def losses(self) -> SwarmTable:
        """Return the held-out losses of the finished runs, by domain.

        Raises:
            DataError: a finished run has another mixture or other settings, or no held-out losses.
        """
        finished = []
        for name, expected in zip(self.names, self.configs(), strict=True):
            folder = RunFolder(Path(expected.run.root) / expected.run.name / name)
            if _is_finished(folder):
                _check_settings(folder, expected)
                finished.append((name, _held_out_losses(folder, self.record.names)))
        values = np.array([losses for _, losses in finished], np.float64).reshape(len(finished), len(self.record.names))
        return SwarmTable(runs=tuple(name for name, _ in finished), columns=self.record.names, values=values)


def _is_finished(folder: RunFolder) -> bool:
    if not folder.config.is_file():
        return False
    end = read_end(folder, max(folder.attempts(), default=0))
    return end is not None and end.exit_code == 0


def _check_settings(folder: RunFolder, expected: Config) -> None:
    recorded = load_config(folder.config)
    for group in ("mixture", "training", "query"):
        if getattr(recorded, group) != getattr(expected, group):
            raise DataError(
                f"{folder.path} is a run with other values of {group} than the proxy of this name.\n"
                "  A swarm of this name existed before. Remove its runs, or sample into a folder with another name."
            )


def _held_out_losses(folder: RunFolder, names: Sequence[str]) -> list[float]:
    """Return the losses of the newest validation, in the order of `names`; NaN where a domain has none."""
    validations = read_events(folder.metric("validation"))
    chunks = read_events(folder.metric("mixture"))
    if not validations or not chunks:
        raise DataError(
            f"{folder.path} has finished without a validation, so it has no held-out losses.\n  Set query.holdout."
            "fraction and training.validate_every, or call DataPlane.held_out in your own loop, and sample again."
        )
    domains = chunks[0]["domains"]
    losses: Mapping[str, float | None] = dict(zip(domains, validations[-1]["domain_loss"], strict=True))
    return [np.nan if (loss := losses.get(name)) is None else loss for name in names]
