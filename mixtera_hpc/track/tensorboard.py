"""Events as TensorBoard scalars. Needs the package `tensorboard`, not torch."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.track.scalars import ScalarFlattener

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker:
    """A `Tracker` that writes event files below `folder`.

    The first event of an attempt tells TensorBoard to forget what earlier attempts wrote from that step on.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f"track.tensorboard=true, but the package tensorboard cannot be imported ({error}).\n"
                "  pip install tensorboard, or set track.tensorboard=false."
            ) from None
        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder))
        self._flattener = ScalarFlattener()
        self._begun = False

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        step = int(event.get("step", 0))
        if not self._begun:
            self._begin(step)
        values = [
            self._summaries.Summary.Value(tag=tag, simple_value=value)
            for tag, value in self._flattener.flatten(stream, event).items()
        ]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()

    def _begin(self, step: int) -> None:
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, session_log=start))
        self._begun = True
