"""One stream of metric events, to JSONL always and to TensorBoard or W&B when asked.

Only rank 0 tracks. An event costs one encode and one `write` of a few hundred bytes, no fsync: what a killed process leaves
behind is complete up to at most its last line.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config

__all__ = ["JsonLinesTracker", "MultiTracker", "NullTracker", "Tracker", "open_append", "open_tracker"]


class Tracker(Protocol):
    """Where metric events go."""

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        """Record one event; values are numbers, texts, lists of them, or numpy arrays."""
        ...

    def close(self) -> None:
        """Write out what is still held back."""
        ...


class NullTracker:
    """Tracks nothing: ranks other than 0, and runs without a folder."""

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


class MultiTracker:
    """Sends every event to several trackers, in order."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(stream, event)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class JsonLinesTracker:
    """Appends events to `<folder>/<stream>.jsonl`, each with `time` and `attempt`."""

    def __init__(self, folder: Path, attempt: int, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._folder = folder
        self._attempt = attempt
        self._clock = clock
        self._files: dict[str, Any] = {}

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        stamped = {"time": self._clock().isoformat(), "attempt": self._attempt, **event}
        self._file(stream).write(msgspec.json.encode(stamped, enc_hook=_from_numpy) + b"\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, stream: str) -> Any:
        if stream not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files[stream] = open_append(self._folder / f"{stream}.jsonl")
        return self._files[stream]


def open_tracker(config: Config, folder: RunFolder | None, *, rank: int, attempt: int) -> Tracker:
    """The tracker of one rank.

    Raises:
        ConfigError: `track.tensorboard` or `track.wandb` is on and its package is not installed.
    """
    if rank != 0 or folder is None:
        return NullTracker()
    trackers: list[Tracker] = [JsonLinesTracker(folder.metrics, attempt)]
    if config.track.tensorboard:
        from mixtera_hpc.track.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(folder.metrics / "tensorboard"))
    if config.track.wandb:
        from mixtera_hpc.track.wandb import WandbTracker

        trackers.append(WandbTracker(config, folder))
    return trackers[0] if len(trackers) == 1 else MultiTracker(trackers)


def open_append(path: Path) -> Any:
    """Open unbuffered at the end, after cutting off what a killed writer left of a line."""
    file = path.open("ab+", buffering=0)
    end = file.seek(0, 2)
    while end > 0:
        start = max(end - 65536, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
    return file


def _from_numpy(value: Any) -> Any:
    """Arrays become lists and numpy scalars numbers; NaN becomes null."""
    return value.tolist()
