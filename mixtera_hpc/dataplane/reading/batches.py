"""What a rank gets of every step, and which part of the global batch that is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import ConfigError

__all__ = ["Batch", "BatchSlice", "BatchSource", "positions_of", "step_of"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The part of one step that one rank gets: B sequences of T predicted tokens, or B samples."""

    step: int
    """Training step."""
    domain_ids: Ints
    """Domain of each sequence, -1 for padding; shape (B,)."""
    positions: Ints
    """Positions of the sequences in the global batch; shape (B,)."""
    tokens: Ints
    """Token ids; shape (B, T + 1), or (B, 0) with `mixture.unit=samples`."""
    loss_mask: NDArray[np.bool_]
    """Which predicted tokens count; shape (B, T)."""
    document_ids: NDArray[np.int32]
    """Number of the document of each token, from 0 in every sequence; shape (B, T + 1)."""
    payloads: list[Any] | None = None
    """The B raw samples with `mixture.unit=samples`, None for padding; else None."""
    digests: list[str] | None = None
    """Digests of the B sequences' tokens, or of the B samples, with `dataplane.audit`; else None. Zeros for padding."""
    chunk: int = 0
    plan_digest: int = 0
    """Digest of the plan that the step was served from."""

    @property
    def is_padding(self) -> NDArray[np.bool_]:
        """Mask of the rows without a sequence, shape (B,); only in a last batch with `dataplane.last_batch=pad`."""
        return self.domain_ids < 0

    @property
    def position_ids(self) -> NDArray[np.int32]:
        """Position of each token in its document, counted from the first of its tokens in the sequence; (B, T + 1)."""
        token = np.arange(self.document_ids.shape[1], dtype=np.int32)
        begins = np.ones(self.document_ids.shape, np.bool_)
        begins[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        # The newest beginning of a document so far.
        first = np.maximum.accumulate(np.where(begins, token, 0), axis=1)
        return token - first


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSlice:
    """The part of every global batch that a rank gets. Ranks of one model-parallel group get the same part."""

    first: int
    """First position in the global batch."""
    size: int
    """Sequences per step."""
    is_group_leader: bool = True
    """Whether the rank is the first of its group. Only leaders contribute to sums over ranks."""

    @classmethod
    def of(cls, plane: DataPlaneConfig, rank: int, num_ranks: int) -> "BatchSlice":
        """Return the slice of `rank` in a job of `num_ranks`.

        Raises:
            ConfigError: the ranks cannot form groups, or the groups cannot share the global batch evenly.
        """
        group_size = plane.model_parallel_size
        # Ranks of a group are neighbours: group g consists of ranks [g * group_size, (g + 1) * group_size).
        num_groups, ungrouped = divmod(num_ranks, group_size)
        if ungrouped:
            raise ConfigError(
                f"dataplane.model_parallel_size is {group_size}, which does not divide the {num_ranks} ranks that were "
                f"started.\n  Start a multiple of {group_size} ranks, or change dataplane.model_parallel_size."
            )
        if plane.global_batch_size % num_groups:
            raise ConfigError(
                f"dataplane.global_batch_size={plane.global_batch_size} cannot be shared evenly by {num_ranks} ranks "
                f"in groups of {group_size} (dataplane.model_parallel_size).\n"
                f"  Change the number of ranks, or make dataplane.global_batch_size a multiple of {num_groups}."
            )
        return cls.of_rank(rank, num_ranks, group_size, plane.global_batch_size)

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, model_parallel_size: int, global_batch_size: int) -> "BatchSlice":
        """Return the slice of `rank`; all sizes are known to divide each other."""
        # All ranks of a group compute the same numbers.
        size = global_batch_size // (num_ranks // model_parallel_size)
        return cls(
            first=rank // model_parallel_size * size,
            size=size,
            is_group_leader=rank % model_parallel_size == 0,
        )


def step_of(batch: Batch | Mapping[str, Any]) -> int:
    """Return the training step of a batch, or of a mapping with its `step`."""
    return batch.step if isinstance(batch, Batch) else int(batch["step"])


def positions_of(batch: Batch | Mapping[str, Any]) -> Any:
    """Return the positions of the sequences that a batch or mapping holds; None if it does not name them."""
    return batch.positions if isinstance(batch, Batch) else batch.get("positions")


class BatchSource(Protocol):
    """Makes one rank's batches: in this process (`BatchMaker`) or in others (`Workers`)."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """Where it reads, one place per process."""

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """Yield this rank's batches of `plan`, from training step `first_step` on."""

    def close(self) -> None:
        """Free everything; `batches` is not running."""
