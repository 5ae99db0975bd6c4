"""Record events as TensorBoard scalars. Needs the package `tensorboard`, but not torch."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.track.scalars import ScalarFlattener

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker:
    """A `Tracker` that writes TensorBoard event files into `folder`.

    The first event of an attempt makes TensorBoard discard the events of earlier attempts from its step on.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:  # An optional package.
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f"track.tensorboard=true, but the package tensorboard cannot be imported ({error}).\n"
                "  Run pip install tensorboard, or set track.tensorboard=false."
            ) from None
        self._events = event_pb2
        self._summaries = summary_pb2
        self._writer = EventFileWriter(str(folder))
        self._flattener = ScalarFlattener()
        self._has_started = False

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        step = int(event.get("step", 0))
        if not self._has_started:
            self._start_session(step)
        values = [
            self._summaries.Summary.Value(tag=tag, simple_value=value)
            for tag, value in self._flattener.flatten(stream, event).items()
        ]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()

    def _start_session(self, step: int) -> None:
        """Write the event that makes TensorBoard discard older events from `step` on."""
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, session_log=start))
        self._has_started = True
