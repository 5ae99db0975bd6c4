"""Record metric events: always as JSONL, and in TensorBoard or W&B if configured.

Only rank 0 records. Price: an event costs one encoding and one `write` of a few hundred bytes, without fsync. The files
of a killed process are complete except for at most the last line.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.track.append_file import AppendFile
from mixtera_hpc.track.packed_events import EventPacker

__all__ = ["JsonLinesTracker", "MultiTracker", "NullTracker", "Tracker", "open_tracker"]


class Tracker(Protocol):
    """The protocol of everything that records metric events."""

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        """Record one event of `stream`; values are numbers, texts, lists of them, or numpy arrays."""
        ...

    def close(self) -> None:
        """Write everything that is still buffered."""
        ...


class NullTracker:
    """A tracker that records nothing, for ranks other than 0 and for runs without a folder."""

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


class MultiTracker:
    """A tracker that sends every event to several trackers, in order."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(stream, event)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class JsonLinesTracker:
    """A tracker that appends events to `<folder>/<stream>.jsonl`, each with `time` and `attempt`."""

    def __init__(self, folder: Path, attempt: int, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._folder = folder
        self._attempt = attempt
        self._clock = clock
        self._files: dict[str, AppendFile] = {}
        self._packers: dict[str, EventPacker] = {}

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        if stream not in self._packers:
            self._packers[stream] = EventPacker(stream)
        packed = self._packers[stream].pack(event)
        stamped = {"time": self._clock().isoformat(), "attempt": self._attempt, **packed}
        self._file(stream).append(msgspec.json.encode(stamped, enc_hook=_from_numpy) + b"\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, stream: str) -> AppendFile:
        if stream not in self._files:
            file = AppendFile(self._folder / f"{stream}.jsonl")
            file.truncate_incomplete_line()
            self._files[stream] = file
        return self._files[stream]


def open_tracker(config: Config, folder: RunFolder | None, *, rank: int, attempt: int) -> Tracker:
    """Return the tracker of one rank.

    Raises:
        ConfigError: `track.tensorboard` or `track.wandb` is on and its package is not installed.
    """
    if rank != 0 or folder is None:
        return NullTracker()
    trackers: list[Tracker] = [JsonLinesTracker(folder.metrics, attempt)]
    # Optional packages: imported only if configured.
    if config.track.tensorboard:
        from mixtera_hpc.track.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(folder.tensorboard))
    if config.track.wandb:
        from mixtera_hpc.track.wandb import WandbTracker

        trackers.append(WandbTracker(config, folder))
    return trackers[0] if len(trackers) == 1 else MultiTracker(trackers)


def _from_numpy(value: Any) -> Any:
    """Convert numpy arrays to lists and numpy scalars to numbers. msgspec writes NaN as null."""
    return value.tolist()
