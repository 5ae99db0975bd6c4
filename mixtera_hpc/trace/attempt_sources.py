"""The data that each attempt of a run was served from, opened again from the index."""

from typing import Any

import msgspec

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.journal import AttemptRecord
from mixtera_hpc.dataplane.plane_state import check_identity
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.run_identity import config_for_identity, subset_for_identity
from mixtera_hpc.errors import ConfigError, DataError

__all__ = ["AttemptSources", "Record"]

Record = dict[str, Any]
"""One line of the output of `trace` or `plan`, ready for JSON."""


class AttemptSources:
    """The sources that the attempts of a run served from, opened on demand; one for every stream version."""

    def __init__(self, config: Config) -> None:
        """Store the recorded configuration of the run; the journal has the values that differ for each attempt."""
        self._config = config
        self._opened: dict[bytes, Source] = {}

    def of(self, attempt: AttemptRecord) -> Source:
        """Return the source that `attempt` served from.

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
