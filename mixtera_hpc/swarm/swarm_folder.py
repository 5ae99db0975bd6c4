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
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import DomainKey, domain_key_to_plain, parse_domain_key
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.swarm.mixture_space import MixtureSpace

__all__ = ["SwarmFolder", "SwarmRecord"]

ARRAYS = ("sizes", "prior", "low", "high", "basis", "mixtures")


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
    """Items of one epoch of each domain. With `mixture.fraction`, an estimate for all samples; shape (K,)."""
    prior: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    basis: NDArray[np.float64]
    """See `MixtureSpace`."""
    mixtures: NDArray[np.float64]
    """Mixture of every proxy, as its file has it; shape (N, K)."""

    @property
    def space(self) -> MixtureSpace:
        """The mixtures that are allowed."""
        return MixtureSpace(names=self.names, prior=self.prior, low=self.low, high=self.high, basis=self.basis)

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
        arrays = {name: np.array(plain[name], np.float64) for name in ARRAYS if name != "sizes"}
        size = len(plain["names"])
        arrays["mixtures"] = arrays["mixtures"].reshape(-1, size)
        arrays["basis"] = arrays["basis"].reshape(-1, size)
        return cls(
            config=from_plain(Config, plain["config"]),
            overrides=tuple(plain["overrides"]),
            names=tuple(plain["names"]),
            keys=tuple(parse_domain_key(key) for key in plain["keys"]),
            sizes=np.array(plain["sizes"], np.int64),
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
