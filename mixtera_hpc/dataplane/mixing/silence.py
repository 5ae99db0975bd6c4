"""A mixture that learns, and a trainer that records no losses: the mixture never changes, which the user must know."""

import logging

from mixtera_hpc.config.mixture.learning import learning_parts, learning_warnings, needs_held_out
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["SilenceWatch"]

logger = logging.getLogger("mixtera_hpc")


class SilenceWatch:
    """Counts the chunks without losses of one rank."""

    def __init__(self, config: Config, rank: int) -> None:
        """Begin before the first chunk; only rank 0 warns."""
        self._learns = any(True for _ in learning_parts(config.mixture))
        self._from_held_out = needs_held_out(config.mixture)
        self._has_held_out = False
        self._limit = config.dataplane.feedback_lag + 2
        """Chunks without losses that are normal: their losses may be on their way."""
        self._is_root = rank == 0
        if self._is_root:
            for warning in learning_warnings(config):
                logger.warning("%s", warning)
        self._chunks_without_loss = 0

    def enter_chunk(self) -> bool | None:
        """Return whether there were losses in the last `feedback_lag` + 2 chunks; warn once if not.

        For an algorithm that learns from held-out losses: whether there was a validation.

        None for a mixture that does not learn.
        """
        if not self._learns:
            return None
        self._chunks_without_loss += 1
        if self._from_held_out:
            return self._has_held_out
        # The chunk that begins now is the one after them.
        if self._chunks_without_loss == self._limit + 1 and self._is_root:
            logger.warning(
                "The mixture is dynamic, but no losses were recorded in the last %d chunks, so it does not change.\n"
                "  Call record(batch, loss) after every step, or choose a mixture that does not learn.",
                self._limit,
            )
        return self._chunks_without_loss <= self._limit

    def note_losses(self, statistics: DomainStatistics) -> None:
        """Take the statistics of a step."""
        if self._learns and statistics.num_sequences.any():
            self._chunks_without_loss = 0

    def note_held_out(self) -> None:
        """Note that there are held-out losses."""
        self._has_held_out = True
