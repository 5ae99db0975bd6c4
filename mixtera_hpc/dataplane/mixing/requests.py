"""Requests for another mixture in a running job, from a given chunk on.

`mixtera-hpc mixture set RUN FILE` writes a request to `control/mixture.json`. Rank 0 reads it at the end of a step and
records its decision. The mixture takes effect at the requested chunk, or else at the first chunk that is not planned
yet. From then on the decision is part of the run, whichever checkpoint an attempt continues from. A request for a chunk
that is planned already is refused, and the refusal is recorded too.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import from_plain, raise_problems, to_plain
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.mixture.check_mixture import mixture_problems
from mixtera_hpc.config.mixture.domain_tree import domain_entries
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig
from mixtera_hpc.core.domain_keys import canonical_key
from mixtera_hpc.dataplane.recording.journal import read_lines
from mixtera_hpc.errors import ConfigError, DataError

__all__ = [
    "MixtureDecision",
    "MixtureRequest",
    "parse_request",
    "read_decisions",
    "requested_mixture",
    "write_request",
]

FIXED_KEYS = ("unit", "on_exhausted", "max_epochs", "fraction")
"""Keys of a mixture that define the streams of a run; a request cannot change them."""

MAX_CHUNK = 1 << 53
"""No run has as many chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureRequest:
    """A mixture that a user requests for a run."""

    mixture: MixtureConfig
    chunk: int | None
    """First chunk to be served from it; None: as soon as possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDecision:
    """The decision of rank 0 on a request."""

    chunk: int
    """First chunk served from `mixture`; for a refused request, the chunk that it asked for."""
    mixture: MixtureConfig
    refused: str | None = None
    """The reason for a refusal; None if the request was accepted."""

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as a line of `decisions.jsonl` and of the journal."""
        return {"kind": "mixture", "chunk": self.chunk, "mixture": to_plain(self.mixture), "refused": self.refused}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> "MixtureDecision":
        """Parse what `to_dict` returned."""
        mixture = from_plain(MixtureConfig, line["mixture"], "mixture")
        return cls(chunk=line["chunk"], mixture=mixture, refused=line["refused"])


def requested_mixture(current: MixtureConfig, content: Any) -> MixtureConfig:
    """Return the mixture that a YAML file requests for a run that is served from `current`.

    Args:
        current: the mixture of the run.
        content: content of the file: a mapping of the keys below `mixture`, or one with the single key `mixture`.

    Raises:
        ConfigError: the mixture is invalid, or it changes more than the weights.
    """
    inner = content.get("mixture", content) if isinstance(content, Mapping) else content
    if inner is not content and len(content) > 1:
        others = ", ".join(str(key) for key in content if key != "mixture")
        raise ConfigError(f"Only `mixture` can be changed in an existing run. Remove {others}.")

    # Keys that cannot change keep the values of the run unless the file names them.
    if isinstance(inner, Mapping):
        inner = {**{name: getattr(current, name) for name in FIXED_KEYS}, **inner}
    mixture = from_plain(MixtureConfig, inner, "mixture")
    raise_problems(mixture_problems(mixture))
    if changed := _changed_streams(current, mixture):
        raise ConfigError(
            f"{changed[0]} cannot change in an existing run; only weights can.\n  Remove it, or start a new run."
        )
    return mixture


def _changed_streams(current: MixtureConfig, requested: MixtureConfig) -> list[str]:
    """Return the keys of `requested` that would change the streams or the domains of the run."""
    changed = [f"mixture.{name}" for name in FIXED_KEYS if getattr(requested, name) != getattr(current, name)]
    if "arbitrary" in (requested.kind, current.kind):
        changed.append("mixture.kind=arbitrary")
    if requested.group_by and requested.group_by != current.group_by:
        changed.append("mixture.group_by")
    # Epoch limits and fractions of a domain belong to its stream, loss weights to the run; a request may repeat them.
    by_key = {canonical_key(entry.key): entry.domain for entry in domain_entries(current)}
    for entry in domain_entries(requested):
        domain = by_key.get(canonical_key(entry.key), DomainConfig())
        for name in ("max_epochs", "fraction", "loss_weight"):
            if getattr(entry.domain, name) not in (None, getattr(domain, name)):
                changed.append(f"{entry.path}.{name}")
    return changed


def write_request(run: RunFolder, request: MixtureRequest) -> None:
    """Write a request for rank 0 of a run, atomically.

    Raises:
        ConfigError: the run has not read an earlier request yet.
    """
    target = run.mixture_request
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"chunk": request.chunk, "mixture": to_plain(request.mixture)}))
    try:
        _publish(temporary, target)
    except FileExistsError:
        raise ConfigError(
            f"{target} holds a request that the run has not read yet. It reads requests at the end of a step, or when "
            "it continues.\n  Wait until the file is gone, or remove it."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give a complete file its name; raise FileExistsError if the name is taken."""
    try:
        # A hard link fails if the name exists, so that of two users who request at the same time one gets the error.
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # A file system without hard links, such as exFAT.
        if target.exists():
            raise FileExistsError(target) from None
        temporary.rename(target)


def parse_request(text: str) -> MixtureRequest:
    """Parse what `write_request` wrote.

    Raises:
        ConfigError: the text is not a valid request.
    """
    try:
        data = parse_json(text)
        chunk = data["chunk"]
        if chunk is not None and (type(chunk) is not int or not 0 <= chunk <= MAX_CHUNK):
            raise ValueError(f"chunk is {chunk!r:.40}, expected a number of a chunk, or null")
        return MixtureRequest(chunk=chunk, mixture=from_plain(MixtureConfig, data["mixture"], "mixture"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"The requested mixture cannot be read: {error}") from None


def read_decisions(path: Path | None) -> list[MixtureDecision]:
    """Return all decisions on mixtures in `decisions.jsonl`, oldest first."""
    if path is None or not path.exists():
        return []
    try:
        return [MixtureDecision.from_dict(line) for line in read_lines(path) if line["kind"] == "mixture"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} has a line that is no decision ({error}).\n  Restore the file.") from None
