"""The folder of a swarm: its files, and the record of the sampled mixtures.

<folder>/
  swarm.json                          configuration, domains, bounds and sampled mixtures
  ratios.csv metrics.csv              the mixture of every proxy; the held-out losses of the finished ones
  earlier_ratios.csv earlier_metrics.csv   runs of an earlier swarm, with --reuse
  mixture/NAME-000.yaml …             the mixture of every proxy, as config files of the group `mixture`
  mixture/NAME-proposal.yaml          the proposed mixture
  proposal.json swarm.html            numbers of the last fit, and its page
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.schema import Config, MixtureConfig, ScheduleConfig, StageConfig
from mixtera_hpc.core.domain_keys import DomainKey, domain_key_to_plain, parse_domain_key
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.swarm.mixture_file import fixed_mixture, without_fractions
from mixtera_hpc.swarm.mixture_space import MixtureSpace
from mixtera_hpc.swarm.training_phases import share_names

__all__ = ["SwarmFolder", "SwarmRecord"]

ARRAYS = ("sizes", "prior", "low", "high", "basis", "phases", "limit", "starts", "mixtures")
COUNTS = ("sizes", "starts")
"""Arrays of whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwarmRecord:
    """The sampled mixtures and their configuration. Two records with the same text are the same swarm."""

    config: Config
    """The configuration of all proxies; its mixture is that of the overrides, not of a proxy."""
    overrides: tuple[str, ...]
    """The overrides as typed."""
    names: tuple[str, ...]
    """Names of the K domains."""
    keys: tuple[DomainKey, ...]
    sizes: NDArray[np.int64]
    """Items of one epoch of each domain, without `mixture.fraction`; shape (K,)."""
    prior: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    basis: NDArray[np.float64]
    phases: NDArray[np.float64]
    limit: NDArray[np.float64]
    """See `MixtureSpace`."""
    starts: NDArray[np.int64]
    """First step of every phase of a proxy; shape (P,)."""
    mixtures: NDArray[np.float64]
    """Mixture of every proxy, as its file has it; shape (N, C)."""

    @property
    def space(self) -> MixtureSpace:
        """The mixtures that are allowed."""
        return MixtureSpace(
            names=self.names,
            prior=self.prior,
            low=self.low,
            high=self.high,
            basis=self.basis,
            phases=self.phases,
            limit=self.limit,
        )

    @property
    def num_phases(self) -> int:
        """Number of phases, P."""
        return len(self.phases)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all shares of a mixture; shape (C,)."""
        return tuple(share_names(self.names, self.num_phases))

    @property
    def natural(self) -> NDArray[np.float64]:
        """Natural shares, in every phase; shape (C,)."""
        return np.tile(self.sizes / max(int(self.sizes.sum()), 1), self.num_phases)

    def mixture_of(self, weights: NDArray[np.float64]) -> MixtureConfig:
        """Return the mixture of a proxy with these shares, (C,); with several phases, a schedule in its steps."""
        schedule = None
        if self.num_phases > 1:
            schedule = ScheduleConfig(stages=[StageConfig(start=float(start)) for start in self.starts])
        return fixed_mixture(self.config.mixture, self.keys, weights, schedule)

    def proposed_mixture(self, weights: NDArray[np.float64]) -> MixtureConfig:
        """Return the mixture of the final run, which has all samples.

        With several phases and `swarm.target_tokens`, it is a schedule in tokens of that run; else in steps of proxies.
        """
        base = without_fractions(self.config.mixture)
        if not self.starts_in_tokens:
            return without_fractions(self.mixture_of(weights))
        begins = np.rint(np.cumsum([0.0, *self.config.swarm.phases[:-1]]) * (self.config.swarm.target_tokens or 0))
        stages = [StageConfig(start=float(begin)) for begin in begins]
        return fixed_mixture(base, self.keys, weights, ScheduleConfig(unit="tokens", stages=stages))

    @property
    def starts_in_tokens(self) -> bool:
        """True if the phases of the final run are known."""
        in_tokens = self.config.mixture.unit == "tokens"
        return self.num_phases > 1 and in_tokens and self.config.swarm.target_tokens is not None

    def to_plain(self) -> dict[str, Any]:
        """Return the record as JSON."""
        return {
            "overrides": list(self.overrides),
            "config": to_plain(self.config),
            "names": list(self.names),
            "keys": [domain_key_to_plain(key) for key in self.keys],
            **{name: getattr(self, name).tolist() for name in ARRAYS},
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "SwarmRecord":
        """Return the record that `to_plain` wrote."""
        arrays = {name: np.array(plain[name], np.float64) for name in ARRAYS if name not in COUNTS}
        size = len(arrays["prior"])
        arrays["mixtures"] = arrays["mixtures"].reshape(-1, size)
        arrays["basis"] = arrays["basis"].reshape(-1, size)
        return cls(
            config=from_plain(Config, plain["config"]),
            overrides=tuple(plain["overrides"]),
            names=tuple(plain["names"]),
            keys=tuple(parse_domain_key(key) for key in plain["keys"]),
            sizes=np.array(plain["sizes"], np.int64),
            starts=np.array(plain["starts"], np.int64),
            **arrays,
        )


@dataclass(frozen=True, slots=True)
class SwarmFolder:
    """The paths of a swarm. Creates nothing until something is written."""

    path: Path

    @classmethod
    def named(cls, path: Path) -> "SwarmFolder":
        """Return the folder; its name is that of the proxies.

        Raises:
            ConfigError: the name cannot be that of a run.
        """
        absolute = path.absolute()
        if not re.fullmatch(r"\w[\w.-]*", absolute.name):
            raise ConfigError(
                f"{absolute.name!r} names the swarm and its runs. Use letters, digits, '.', '_' and '-' for the last "
                "part of the folder."
            )
        return cls(absolute)

    @property
    def name(self) -> str:
        """Name of the swarm, `run.name` of its proxies."""
        return self.path.name

    @property
    def record(self) -> Path:
        """The record of the sampled mixtures."""
        return self.path / "swarm.json"

    @property
    def ratios(self) -> Path:
        """The mixtures of all proxies."""
        return self.path / "ratios.csv"

    @property
    def metrics(self) -> Path:
        """The losses of the finished proxies."""
        return self.path / "metrics.csv"

    @property
    def earlier_ratios(self) -> Path:
        """The mixtures of an earlier swarm."""
        return self.path / "earlier_ratios.csv"

    @property
    def earlier_metrics(self) -> Path:
        """The losses of an earlier swarm."""
        return self.path / "earlier_metrics.csv"

    @property
    def proposal_record(self) -> Path:
        """The numbers of the last fit."""
        return self.path / "proposal.json"

    @property
    def page(self) -> Path:
        """The page of the last fit."""
        return self.path / "swarm.html"

    def mixture_file(self, run: str) -> Path:
        """Return the config file of one mixture."""
        return self.path / "mixture" / f"{run}.yaml"

    @property
    def proposal_name(self) -> str:
        """Name of the config file of the proposal."""
        return f"{self.name}-proposal"

    def proxy_names(self, num: int) -> list[str]:
        """Return the names of the first `num` proxies, which are also ids of their runs."""
        return [f"{self.name}-{number:03d}" for number in range(num)]

    def read(self) -> SwarmRecord:
        """Return the record of the swarm.

        Raises:
            DataError: there is no swarm here, or its record is damaged.
        """
        if not self.record.is_file():
            raise DataError(
                f"{self.path} is no swarm: it has no {self.record.name}.\n  Sample one with mixtera-hpc swarm sample."
            )
        try:
            return SwarmRecord.from_plain(parse_json(self.record.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise DataError(f"{self.record} is damaged: {error}.\n  Sample the swarm into a new folder.") from None

    def write(self, path: Path, text: str) -> None:
        """Write one file of the swarm, complete or not at all."""
        with explain_write_errors(self.path, "The swarm is as it was."):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(path)

    def write_json(self, path: Path, plain: dict[str, Any]) -> None:
        """Write one JSON file of the swarm."""
        self.write(path, json.dumps(plain, indent=1) + "\n")
