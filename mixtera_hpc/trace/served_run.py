"""A run as its folder records it: the journal, and the data that each attempt served, opened again from the index."""

from typing import Any

import msgspec

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane_state import check_identity
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord, History
from mixtera_hpc.dataplane.resume.run_identity import config_for_identity, subset_for_identity
from mixtera_hpc.errors import ConfigError, DataError

__all__ = ["Record", "ServedRun"]

Record = dict[str, Any]
"""One line of the output of `trace` or `plan`, ready for JSON."""


class ServedRun:
    """The records of one run, and the data that it served."""

    def __init__(self, folder: RunFolder, config: Config | None = None) -> None:
        """Read the journal.

        Args:
            folder: the run.
            config: the configuration of the run, None for the recorded one. The journal has the values that differ for
                each attempt.

        Raises:
            DataError: the journal is missing, or the line that begins an attempt is lost.
        """
        self.folder = folder
        self.history = History(folder.journal)
        """The attempts, and what they served."""
        self._config = config or load_config(folder.config)
        self._opened: dict[bytes, Source] = {}
        """Identity and stream version → the source."""

    def source_of(self, attempt: AttemptRecord) -> Source:
        """Return the source that `attempt` served from; opened at the first call.

        Raises:
            DataError: the index, the tokenizer or the settings differ from those of the attempt.
        """
        key = msgspec.json.encode([attempt.identity, attempt.stream_version.to_dict()])
        if key not in self._opened:
            config = config_for_identity(self._config, attempt.identity)
            source = open_source(config, Local(), subset=subset_for_identity(attempt.identity), check=False)
            try:
                check_identity(attempt.identity, source.identity())
            except ConfigError as error:
                message = str(error).partition("\n  Resume")[0]
                raise DataError(message.replace("saved state", "journal")) from None
            self._opened[key] = source.at_version(attempt.stream_version)
        return self._opened[key]
