"""`BatchFeed`: the protocol of what a session gets its batches from."""

from collections.abc import Sequence
from typing import Protocol

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace

__all__ = ["BatchFeed"]


class BatchFeed(Protocol):
    """The origin of the batches of a session: its own reading thread or processes, or the leader of its group."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """Places where this rank reads; empty if it does not."""

    def submit(self, plan: ChunkPlan, first_step: int) -> None:
        """Take a plan; its steps before `first_step` are skipped."""

    def get(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None after the end of the data.

        Raises:
            queue.Empty: no batch is ready within `timeout_s`.
        """

    @property
    def num_ready(self) -> int:
        """Batches that `get` returns without waiting; as many as possible if this rank never waits for a read."""

    def advance(self) -> None:
        """Pass on what is ready; does not block."""

    def finish(self) -> None:
        """Complete what peers may wait for. **Collective.**"""

    def close(self, timeout_s: float | None = None) -> None:
        """Stop reading; see `Prefetcher.close`."""
