"""Submit a request for another mixture to a run: check it against the run's data, and leave it for rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, requested_mixture, write_request
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run
from mixtera_hpc.errors import ConfigError

__all__ = ["SubmittedRequest", "submit_request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedRequest:
    """A request that the run has not read yet."""

    names: Sequence[str]
    """Names of the domains."""
    weights: NDArray[np.float64] | None
    """Weights that the requested mixture begins with; shape (K,)."""


def submit_request(
    folder: RunFolder, config: Config, content: Any, *, chunk: int | None, is_active: bool
) -> SubmittedRequest:
    """Check a requested mixture and write it to the control folder of the run.

    Price: one open of the index.

    Args:
        config: the recorded configuration of the run.
        content: the requested mixture, as YAML.
        chunk: first chunk to be served from it; None: the next one that is not planned.
        is_active: True if an attempt of the run is active.

    Raises:
        ConfigError: the mixture is invalid or changes more than the weights, the chunk is planned already, or the run
            has not read an earlier request yet.
        MixtureError: the data of the run cannot be served in these proportions.
    """
    config = pin_to_run(config, folder.journal)
    mixture = requested_mixture(config.mixture, content)

    # `make_mixer` checks the request against the domains and samples of the run. The weights of a dynamic mixture are
    # those that it begins with.
    source = open_source(config, Local(), subset=subset_of_run(folder), check=False)
    weights = make_mixer(mixture, source.mixture_context, learn=False).weights_of(0)
    if weights is not None:
        weights = source.without_dropped_domains(weights)
        weights = weights / (weights.sum() or 1.0)  # The first stage of a schedule may have dropped domains only.

    _check_not_planned(folder, chunk, is_active)
    write_request(folder, MixtureRequest(mixture=mixture, chunk=chunk))
    return SubmittedRequest(names=source.names, weights=weights)


def _check_not_planned(folder: RunFolder, chunk: int | None, is_active: bool) -> None:
    """Refuse now what rank 0 would refuse later: a chunk that is planned.

    An attempt that was killed does not count. The next one continues from a checkpoint and plans its chunks again.
    """
    if chunk is None or not folder.journal.is_file():
        return
    attempts = History(folder.journal).attempts
    if not attempts or not attempts[-1].plans:
        return
    was_killed = attempts[-1].next_step is None and not is_active
    last_planned = attempts[-1].plans[-1].chunk
    if chunk <= last_planned and not was_killed:
        # While the user reads this, the run plans on; two chunks ahead is safe.
        raise ConfigError(
            f"Chunk {chunk} is planned already; the run has planned up to chunk {last_planned}.\n"
            f"  Give --at-chunk next, or {last_planned + 2} or later."
        )
