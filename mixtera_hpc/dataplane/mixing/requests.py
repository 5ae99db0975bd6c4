"""A change of mind: another mixture for a running job, from a named chunk on.

`mixtera-hpc mixture RUN --set FILE` leaves a request in `control/mixture.json`. Rank 0 finds it at the end of a step, gives it
the first chunk that is not planned yet or the later one it names, and writes the decision down; from then on it is part of the
run, whichever checkpoint an attempt goes on from. A request for a chunk that is planned already is refused, in writing too.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.check_mixture import mixture_problems
from mixtera_hpc.config.convert import from_plain, raise_problems, to_plain
from mixtera_hpc.config.domain_tree import domain_entries
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.domain_keys import canonical_key
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.journal import read_lines
from mixtera_hpc.dataplane.mixing.from_config import MixtureContext, make_mixer
from mixtera_hpc.dataplane.mixing.mixers import Mixer, strip_prefix
from mixtera_hpc.errors import ConfigError, MixteraError

__all__ = [
    "MixtureDecision",
    "MixtureRequest",
    "MixtureSequence",
    "read_decisions",
    "requested_mixture",
    "write_request",
]

Weights = NDArray[np.float64]
REQUEST = "mixture.json"
KEPT = ("unit", "on_exhausted", "max_epochs")
"""What belongs to a run's streams, and not to the proportions they are served in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureRequest:
    """What somebody wishes."""

    mixture: MixtureConfig
    chunk: int | None
    """Where it shall begin; None: as soon as possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDecision:
    """What was decided."""

    chunk: int
    """The first one served from `mixture`; or, of a refused request, the one it named."""
    mixture: MixtureConfig
    refused: str | None = None
    """Why nothing changes."""

    def to_dict(self) -> dict[str, Any]:
        """A line of `read_decisions.jsonl` and of the journal."""
        return {"kind": "mixture", "chunk": self.chunk, "mixture": to_plain(self.mixture), "refused": self.refused}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> "MixtureDecision":
        """The inverse of `to_dict`."""
        mixture = from_plain(MixtureConfig, line["mixture"], "mixture")
        return cls(chunk=line["chunk"], mixture=mixture, refused=line["refused"])


def requested_mixture(current: MixtureConfig, wish: Mapping[str, Any]) -> MixtureConfig:
    """The mixture that `wish`, as it is written in YAML, makes of a run's.

    Raises:
        ConfigError: it is none, or changes what weights have no say in.
    """
    inner = wish.get("mixture", wish) if isinstance(wish, Mapping) else wish
    if inner is not wish and len(wish) > 1:
        others = ", ".join(str(key) for key in wish if key != "mixture")
        raise ConfigError(f"{others} stands beside mixture, which is all that can change.\n  Leave it out.")
    kept = {name: getattr(current, name) for name in KEPT}
    mixture = from_plain(MixtureConfig, {**kept, **inner} if isinstance(inner, Mapping) else inner, "mixture")
    raise_problems(mixture_problems(mixture))
    if moved := _moved(current, mixture):
        raise ConfigError(
            f"{moved[0]} cannot change while a run goes on; weights can.\n  Leave it out, or start a new run."
        )
    return mixture


def _moved(current: MixtureConfig, wish: MixtureConfig) -> list[str]:
    """What `wish` says otherwise of the run's streams and domains."""
    found = [f"mixture.{name}" for name in KEPT if getattr(wish, name) != getattr(current, name)]
    if "arbitrary" in (wish.kind, current.kind):
        found.append("mixture.kind=arbitrary")
    if wish.group_by and wish.group_by != current.group_by:
        found.append("mixture.group_by")
    limits = {canonical_key(leaf.key): leaf.domain.max_epochs for leaf in domain_entries(current)}
    for leaf in domain_entries(wish):
        if leaf.domain.max_epochs not in (None, limits.get(canonical_key(leaf.key))):
            found.append(f"{leaf.path}.max_epochs")
    return found


def write_request(control: Path, request: MixtureRequest) -> None:
    """Leave a request for rank 0, all of it or nothing.

    Raises:
        ConfigError: there is one already that nobody has looked at.
    """
    control.mkdir(exist_ok=True)
    part = control / f".{REQUEST}.{os.getpid()}"
    part.write_text(json.dumps({"chunk": request.chunk, "mixture": to_plain(request.mixture)}))
    try:
        os.link(part, control / REQUEST)
    except FileExistsError:
        raise ConfigError(
            f"{control / REQUEST} is waiting to be looked at, at the end of a step or when the run goes on.\n"
            "  Wait for it, or remove it."
        ) from None
    finally:
        part.unlink()


def _request(text: str) -> MixtureRequest:
    try:
        data = json.loads(text)
        return MixtureRequest(chunk=data["chunk"], mixture=from_plain(MixtureConfig, data["mixture"], "mixture"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"control/{REQUEST} cannot be read: {error}") from None


def read_decisions(path: Path | None) -> list[MixtureDecision]:
    """All decisions on mixtures in `read_decisions.jsonl`, oldest first."""
    if path is None or not path.is_file():
        return []
    return [MixtureDecision.from_dict(line) for line in read_lines(path) if line["kind"] == "mixture"]


class MixtureSequence:
    """Mixers that reign one after the other, each from a named chunk on. Each sees the statistics of its own chunks only."""

    def __init__(self, mixture: MixtureConfig, ground: MixtureContext) -> None:
        self._ground = ground
        self._mixers: dict[int, Mixer] = {0: make_mixer(mixture, ground)}
        self._changes: dict[int, MixtureDecision] = {}

    @property
    def decisions(self) -> list[MixtureDecision]:
        """What was decided, by chunk."""
        return [self._changes[chunk] for chunk in sorted(self._changes)]

    def restore(self, changes: Sequence[MixtureDecision]) -> None:
        """Take over what was decided before; of several for one chunk the last one counts, and begins anew where it is new."""
        latest = {change.chunk: change for change in changes if change.refused is None}
        for change in latest.values():
            if self._changes.get(change.chunk) != change:
                self._reign(change)

    def decide_request(self, text: str, first: int) -> MixtureDecision:
        """Decide on what `write_request` left when `first` is the first chunk that is not planned."""
        try:
            request = _request(text)
        except ConfigError as error:
            return MixtureDecision(chunk=first, mixture=MixtureConfig(), refused=str(error))
        chunk = first if request.chunk is None else request.chunk
        change = MixtureDecision(chunk=chunk, mixture=request.mixture)
        if chunk < first:
            why = f"chunk {chunk} is planned already; the first that can still change is {first}"
            return replace(change, refused=why)
        try:
            self._reign(change)
        except MixteraError as error:
            return replace(change, refused=str(error))
        return change

    def weights_of(self, chunk: int) -> Weights | None:
        begin = self._begin_of(chunk)
        return self._mixers[begin].weights_of(chunk - begin)

    def feed(self, statistics: DomainStatistics) -> None:
        chunk_steps = self._ground.timeline.chunk_steps
        begin = self._begin_of(statistics.step // chunk_steps)
        self._mixers[begin].feed(replace(statistics, step=statistics.step - begin * chunk_steps))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"from{begin}/{k}": v for begin, mixer in self._mixers.items() for k, v in mixer.arrays().items()}

    def load(self, changes: Sequence[MixtureDecision], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `decisions` and `arrays` gave."""
        self.restore(changes)
        for begin, mixer in self._mixers.items():
            if own := strip_prefix(f"from{begin}/", arrays):
                mixer.load(own)

    def close(self) -> None:
        for mixer in self._mixers.values():
            mixer.close()

    def _begin_of(self, chunk: int) -> int:
        return max(begin for begin in self._mixers if begin <= chunk)

    def _reign(self, change: MixtureDecision) -> None:
        """Every mixer counts chunks from its own first one, and its timeline says where that lies."""
        line = self._ground.timeline
        timeline = replace(line, step=line.step_of(change.chunk), items=line.items_before(change.chunk))
        mixer = make_mixer(change.mixture, replace(self._ground, timeline=timeline))
        if change.chunk in self._mixers:
            self._mixers[change.chunk].close()
        self._mixers[change.chunk] = mixer
        self._changes[change.chunk] = change
