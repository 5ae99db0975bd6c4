"""The state of a data plane: one uint8 array, O(domains), never pickle.

It holds the plan of the chunk that is being served, the next step, and what the mixing algorithm has learned. Restoring
it costs the same at every step, with any number of ranks. The bytes of the array are a compressed npz file whose entry
`json` is a JSON text; the other entries are arrays. Price: below 64 KiB at 1,000 domains, plus the mixing algorithm's
own state.
"""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import CommError, ConfigError, DataError

__all__ = ["STATE_KEY", "PlaneState", "check_identity", "pack_state", "unpack_state"]

STATE_KEY = "plane"
"""The only key of `DataPlane.state_dict()`. Its value is one array, which every checkpoint library can store."""

VERSION = 3
MAX_STEP = (1 << 62) - 1

JSON_ENTRY = "json"
"""Name of the npz entry that holds the JSON text."""


def pack_state(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Return JSON values and arrays as the bytes of one npz file."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    entries: dict[str, Any] = {JSON_ENTRY: text, **arrays}
    file = io.BytesIO()
    # Compressed: names of domains and the high bytes of counters repeat.
    np.savez_compressed(file, **entries)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def unpack_state(content: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the JSON values and the arrays that `pack_state` was given.

    Raises:
        DataError: the bytes are not a state, or are damaged.
    """
    try:
        with np.load(io.BytesIO(content.tobytes()), allow_pickle=False) as entries:
            arrays = dict(entries)
        facts = parse_json(arrays.pop(JSON_ENTRY).tobytes())
    # numpy, zipfile, zlib and tokenize raise a dozen unrelated types for damaged bytes.
    except Exception as error:
        raise _unreadable(str(error)) from error
    return facts, arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneState:
    """State of a run between two steps."""

    next_step: int
    """The training step of the next batch."""
    plan: ChunkPlan
    """The plan of the chunk that `next_step` lies in, or of the chunk before it when that chunk is not planned yet."""
    mixer: Mapping[str, NDArray[Any]]
    """Learned state of the mixing algorithms."""
    num_fed: int
    """Data steps that they have learned from."""
    decisions: Sequence[MixtureDecision]
    """The accepted requests for other mixtures."""
    stream_version: StreamVersion
    identity: Mapping[str, Any]
    """Identity of the source that the run was served from; see `Source.identity`."""

    def to_array(self) -> NDArray[np.uint8]:
        """Return the state as the bytes of an npz file; see `pack_state`."""
        facts = {
            "version": VERSION,
            "next_step": self.next_step,
            "num_fed": self.num_fed,
            "decisions": [decision.to_dict() for decision in self.decisions],
            "stream_version": self.stream_version.to_dict(),
            "identity": dict(self.identity),
        }
        return pack_state(facts, {"plan": self.plan.to_array(), **self.mixer})

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "PlaneState":
        """Restore what `DataPlane.state_dict` returned; the array may have become a torch tensor.

        Raises:
            ConfigError: the state was written by another version.
            DataError: the bytes are not a state, or are damaged.
            ValueError: it is another object's state.
        """
        if STATE_KEY not in state:
            raise ValueError(
                f"load_state_dict() got a state with the keys {sorted(state)}, but expects {STATE_KEY!r}.\n"
                "  Give it what DataPlane.state_dict() returned."
            )
        content = state[STATE_KEY]
        # A checkpoint of torch may have placed the bytes on an accelerator.
        if hasattr(content, "detach"):
            content = content.detach().cpu().numpy()
        return cls.from_array(np.asarray(content, np.uint8))

    @classmethod
    def from_array(cls, content: NDArray[np.uint8]) -> "PlaneState":
        """Restore what `to_array` returned.

        Raises:
            ConfigError: the state was written by another version.
            DataError: the bytes are not a state, or are damaged.
        """
        plain, arrays = unpack_state(content)
        # Read the version first: the other fields may differ between versions.
        version = plain.get("version") if isinstance(plain, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ConfigError(
                f"The saved state has version {version}, but this code writes and reads version {VERSION}.\n"
                "  Resume with the release that wrote it, or start a new run."
            )
        try:
            return cls._from_facts(msgspec.convert(plain, _Facts), arrays)
        except (msgspec.ValidationError, KeyError, TypeError, ValueError, OverflowError, CommError) as error:
            raise _unreadable(f"{type(error).__name__}: {error}") from error

    @classmethod
    def _from_facts(cls, facts: "_Facts", arrays: dict[str, NDArray[Any]]) -> "PlaneState":
        # The plan shares the file with the arrays of the mixing algorithms, whose names have a prefix.
        plan = ChunkPlan.from_array(np.asarray(arrays.pop("plan"), np.int64))
        return cls(
            next_step=facts.next_step,
            plan=plan,
            mixer=arrays,
            num_fed=facts.num_fed,
            decisions=[MixtureDecision.from_dict(line) for line in facts.decisions],
            stream_version=StreamVersion.from_dict(facts.stream_version),
            identity=facts.identity,
        )


class _Facts(msgspec.Struct, kw_only=True):
    """The JSON values of a state."""

    version: int
    next_step: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
    num_fed: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
    decisions: list[dict[str, Any]]
    stream_version: dict[str, Any]
    identity: dict[str, Any]


def _unreadable(reason: str) -> DataError:
    return DataError(
        f"The saved state of the data plane cannot be read: {reason}.\n  Load another checkpoint of the run."
    )


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Return the names of the fields that differ between two identities; all of them must be `allowed` to.

    Raises:
        ConfigError: other fields differ too; the message names every one.
    """
    # Values from JSON: identities consist of numbers, texts and lists only, so that they compare equal.
    differing = [name for name, value in now.items() if before.get(name) != value]
    refused = [name for name in differing if name not in allowed]
    # Every differing field is named, so that one attempt is enough to repair a configuration.
    if refused:
        lines = "".join(f"\n  - {name} was {before.get(name)!r}, is {now[name]!r}" for name in refused)
        advice = ["Resume with the old values."]
        if "index" in refused:
            generations = ",".join(before.get("index", []))
            advice.append(f"If the index was refreshed since, set index.generations=[{generations}].")
        if "drop" in refused:
            advice.append("Drops are recorded in the run: open the data plane with the folder of the run.")
        if "lanes" in refused:
            advice.append(
                f"Set dataplane.lanes={before.get('lanes')}. Or leave dataplane.lanes out, and load the state before "
                "held_out() is called."
            )
        if refused != ["index"]:
            advice.append(
                "mixtera-hpc resume --help lists what can be changed in a run that has a folder, before its program is "
                "started again."
            )
        raise ConfigError(f"The saved state belongs to a run with other settings:{lines}\n  {' '.join(advice)}")
    return differing
