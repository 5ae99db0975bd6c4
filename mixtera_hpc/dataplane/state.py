"""The state of a data plane: JSON and arrays, O(domains), never pickle.

It holds the plan of the chunk that is being served, the next step, and what the mixing algorithm knows. Restoring it costs
the same at every step, with any number of ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.errors import ConfigError

__all__ = ["PlaneState"]

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneState:
    """Where a run stands between two steps."""

    next_step: int
    plan: ChunkPlan
    """Of the chunk that `next_step` lies in; when that chunk is not planned yet, of the one before it."""
    mixer: Mapping[str, NDArray[Any]]
    """What the mixing algorithm knows."""

    def to_dict(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """`{"json": …, "arrays": …}`, for `json.dump` and `numpy.savez`."""
        facts = {"version": VERSION, "next_step": self.next_step, "identity": dict(identity)}
        return {"json": facts, "arrays": {"plan": self.plan.to_array(), **self.mixer}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], identity: Mapping[str, Any]) -> "PlaneState":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: the state belongs to another run; every field that differs is named.
        """
        facts, arrays = state["json"], dict(state["arrays"])
        if facts["version"] != VERSION:
            raise ConfigError(f"The saved state has version {facts['version']}, this code writes and reads {VERSION}.")
        differing = [k for k, v in identity.items() if facts["identity"].get(k) != v]
        if differing:
            lines = "".join(f"\n  - {k} was {facts['identity'].get(k)!r}, is {identity[k]!r}" for k in differing)
            refreshed = (
                f" For an index that was refreshed since, set index.generation={facts['identity'].get('index')}."
            )
            raise ConfigError(
                f"The saved state belongs to a run with other settings:{lines}\n  Resume with the old ones."
                + refreshed * ("index" in differing)
            )
        plan = ChunkPlan.from_array(np.asarray(arrays.pop("plan"), np.int64))
        return cls(next_step=facts["next_step"], plan=plan, mixer=arrays)
