"""Batches that a rank gets, and the part of the global batch that they hold."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of, sizes_from
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import ConfigError

__all__ = [
    "Batch",
    "BatchSlice",
    "BatchSource",
    "BatchTimes",
    "PickledSamples",
    "check_shared_evenly",
    "positions_of",
    "step_of",
    "with_samples",
]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """The time that it took to make batches. Not part of their content: any two values compare as equal."""

    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Seconds of `read` (waiting for storage or for a core), `decode`, `tokenize` and `pack`."""


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
    """Mask of the predicted tokens that count; shape (B, T)."""
    document_ids: NDArray[np.int32]
    """Number of the document of each token, from 0 in every sequence; shape (B, T + 1)."""
    payloads: list[Any] | None = None
    """The B raw samples with `mixture.unit=samples`, None for padding; else None."""
    digests: list[str] | None = None
    """Digests of the B sequences' tokens, or of the B samples, with `dataplane.audit`; else None. Zeros for padding."""
    loss_weights: NDArray[np.float32] | None = None
    """Factor on the loss of each sequence, 0 for padding, shape (B,); None if no domain has a `loss_weight`."""
    micro_batches: tuple[slice, ...] = ()
    """With `dataplane.sample_budget`, the rows of every micro-batch, the same number on all ranks; those at the end may
    be empty."""
    chunk: int = 0
    plan_digest: int = 0
    """Digest of the plan that the step was served from."""
    times: BatchTimes = BatchTimes()
    """The time that it took to make the batch. The first of the batches that are read together has that of the read."""

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


class PickledSamples(list[Any]):
    """The samples of a batch as a reading process has sent them: pickles of some samples each."""


def with_samples(batch: Batch) -> Batch:
    """Return a batch with its samples.

    The trainer's thread makes the objects when it takes the batch. Another thread would need the interpreter lock for
    it while the trainer runs its step.
    """
    if not isinstance(batch.payloads, PickledSamples):
        return batch
    parts = map(pickle.loads, batch.payloads)  # From our own process.
    return replace(batch, payloads=list(chain.from_iterable(parts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSlice:
    """The part of every global batch that a rank gets. Ranks of one model-parallel group get the same part."""

    group: int = 0
    """Number of the rank's group; groups get consecutive parts of the global batch."""
    num_groups: int = 1
    is_group_leader: bool = True
    """True if the rank is the first of its group. Only leaders contribute to sums over ranks."""

    @classmethod
    def of(cls, plane: DataPlaneConfig, rank: int, num_ranks: int) -> "BatchSlice":
        """Return the slice of `rank` in a job of `num_ranks`.

        Raises:
            ConfigError: the ranks cannot form groups, or the groups cannot share the last global batches evenly.
        """
        group_size = plane.model_parallel_size
        # Ranks of a group are neighbours: group g consists of ranks [g * group_size, (g + 1) * group_size).
        num_groups, ungrouped = divmod(num_ranks, group_size)
        if ungrouped:
            raise ConfigError(
                f"dataplane.model_parallel_size is {group_size}, which does not divide the {num_ranks} ranks that were "
                f"started.\n  Start a multiple of {group_size} ranks, or change dataplane.model_parallel_size."
            )
        check_last_stage(
            plane, num_groups, f"{num_ranks} ranks in groups of {group_size} (dataplane.model_parallel_size)"
        )
        return cls(
            group=rank // group_size,
            num_groups=num_groups,
            is_group_leader=rank % group_size == 0,
        )

    def size_of(self, global_batch_size: int) -> int:
        """Return the sequences that the rank gets of a global batch."""
        return global_batch_size // self.num_groups

    def positions(self, global_batch_size: int) -> slice:
        """Return the positions of the rank's sequences in a global batch."""
        size = self.size_of(global_batch_size)
        return slice(self.group * size, (self.group + 1) * size)


def check_last_stage(plane: DataPlaneConfig, num_groups: int, sharers: str) -> None:
    """Raise ConfigError unless the groups can share the batches of the last stage, which is served by every attempt.

    Stages of a batch ramp that are past when an attempt begins need not fit its ranks. Until a state is loaded, only
    the last stage is known to be served.
    """
    check_shared_evenly(plane, num_groups, sharers, first_step=batch_schedule_of(plane).starts[-1])


def check_shared_evenly(plane: DataPlaneConfig, num_groups: int, sharers: str, *, first_step: int) -> None:
    """Raise ConfigError unless `num_groups` groups of ranks can share every batch from data step `first_step` on."""
    for key, size in sizes_from(plane, first_step).items():
        if size % num_groups:
            raise ConfigError(
                f"{key}={size} cannot be shared evenly by {sharers}.\n"
                f"  Change the number of ranks, or make {key} a multiple of {num_groups}."
            )


def step_of(batch: Batch | Mapping[str, Any]) -> int:
    """Return the training step of a batch, or of a mapping with its `step`."""
    return batch.step if isinstance(batch, Batch) else int(batch["step"])


def positions_of(batch: Batch | Mapping[str, Any]) -> Any:
    """Return the positions of the sequences that a batch or mapping holds; None if it does not name them."""
    return batch.positions if isinstance(batch, Batch) else batch.get("positions")


class BatchSource(Protocol):
    """Makes one rank's batches: in this process (`BatchMaker`) or in others (`Workers`)."""

    next_is_made: bool
    """True if `batches` yields the next batch at once, because it was made together with the last one."""

    @property
    def places(self) -> Sequence[ReadPlace]:
        """Places where it reads, one per process."""

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        """Yield this rank's batches of `plan`, from training step `first_step` on."""

    def close(self) -> None:
        """Free everything; `batches` is not running."""
