"""The ranks at fault for a step: served from another plan, recorded in part, or handed different data.

Price: one all-gather of a few numbers, after a sum that all ranks have found wrong.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator
from mixtera_hpc.dataplane.steps.reduction.step_buffer import BufferFlags, StepContribution
from mixtera_hpc.errors import CommError

__all__ = ["Reduction", "raise_mismatch"]

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Reduction:
    """A reduction in progress."""

    step: int
    buffer: Ints
    result: Ints
    request: CollectiveRequest
    contribution: StepContribution
    """Contribution of this rank."""
    contents: tuple[str, ...]
    """With `dataplane.audit`, the digest of every sequence that this rank handed out."""
    has_other_scalars: bool = False
    """True if peers that recorded the same losses recorded scalars of other sequences."""


def raise_mismatch(comm: Communicator, group: int, reduction: Reduction) -> None:
    """Name the ranks that served a step from another plan than most, or did not record it. **Collective.**

    Ranks may notice a wrong sum at different times. They all raise in the first `wait_for` that includes its step,
    which is the same call of the program on every rank. They may have started reductions of later steps, and not
    all of them the same.
    """
    digests = comm.Allgather(np.array([BufferFlags.of(reduction.buffer).digest], np.int64))[:, 0]
    values, counts = np.unique(digests, return_counts=True)
    differing = np.flatnonzero(digests != values[np.argmax(counts)])
    if not len(differing):
        sums = BufferFlags.of(reduction.result)
        if sums.is_partial:
            _raise_misfit(comm, group, reduction)
        if sums.content:
            _raise_other_contents(comm, group, reduction)
        if reduction.has_other_scalars:
            _raise_other_scalars(comm, group, reduction)
        _raise_partial(comm, group, reduction)
    raise CommError(
        f"Ranks {differing.tolist()} served step {reduction.step} from another plan: they use "
        "different code or read different indexes.\n  Give all nodes the same installation and the same index.path."
    )


def _raise_partial(comm: Communicator, group: int, reduction: Reduction) -> None:
    """Name the ranks that did not record a step that others recorded. **Collective.**"""
    recorded = int(reduction.contribution.has_sequences)
    by_rank = comm.Allgather(np.array([group, recorded], np.int64))
    copies = np.bincount(by_rank[:, 0], weights=by_rank[:, 1])
    # In groups with fewer copies than others, the ranks that did not record.
    silent = np.flatnonzero((copies[by_rank[:, 0]] < copies.max()) & (by_rank[:, 1] == 0))
    raise CommError(
        f"Step {reduction.step} was recorded in part: ranks {silent.tolist()} did not record their losses, others "
        "did.\n  Call record() for every step in all data-parallel groups, on as many ranks in each, or in none."
    )


def _raise_other_scalars(comm: Communicator, group: int, reduction: Reduction) -> None:
    """Name the ranks of a group that recorded the same losses and other scalars. **Collective.**"""
    recorded = int(reduction.contribution.has_sequences)
    by_rank = comm.Allgather(np.array([group, recorded, reduction.contribution.num_scalar_values], np.int64))
    recorders = by_rank[:, 1] == 1
    groups = by_rank[recorders, 0]
    values = by_rank[recorders, 2]
    mixed = [int(number) for number in np.unique(groups) if len(np.unique(values[groups == number])) > 1]
    # With equal numbers in every group, the values belong to other sequences.
    ranks = np.flatnonzero(recorders & (by_rank[:, 0] == (mixed[0] if mixed else group)))
    raise CommError(
        f"Ranks {ranks.tolist()} are model-parallel peers and recorded the same losses of step {reduction.step}, but "
        f"{by_rank[ranks, 2].tolist()} values of scalars.\n"
        "  Give record(scalars=) for the same sequences on every rank that records their losses."
    )


def _raise_misfit(comm: Communicator, group: int, reduction: Reduction) -> None:
    """Name the ranks whose parts of the losses do not add up to whole sequences. **Collective.**"""
    contribution = reduction.contribution
    by_rank = comm.Allgather(np.array([group, contribution.is_partial, contribution.num_recorded], np.int64))
    group = int(by_rank[np.argmax(by_rank[:, 1]), 0])
    ranks = np.flatnonzero(by_rank[:, 0] == group)
    raise CommError(
        f"Step {reduction.step} was recorded in part: ranks {ranks.tolist()} recorded "
        f"{by_rank[ranks, 2].tolist()} tokens, which are not every token of their sequences exactly once.\n"
        "  Call record(batch, loss, tokens=) on every rank along loss_parts, each with its own part; copies of a "
        "part count once."
    )


def _raise_other_contents(comm: Communicator, group: int, reduction: Reduction) -> None:
    """Name the ranks that were handed other sequences than the leader of their group. **Collective.**"""
    own = np.array([group, *(int(content, 16) >> 1 for content in reduction.contents)], np.int64)
    by_rank = comm.Allgather(own)
    # The first rank of every group is its leader. Shape (ranks, sequences).
    leaders = np.array([int(np.argmax(by_rank[:, 0] == group)) for group in by_rank[:, 0]])
    differs = by_rank[:, 1:] != by_rank[leaders, 1:]
    ranks = np.flatnonzero(differs.any(axis=1))
    first = int(ranks[0])
    position = int(by_rank[first, 0]) * differs.shape[1] + int(np.argmax(differs[first]))
    raise CommError(
        f"Ranks {ranks.tolist()} were handed other data than their model-parallel peers: in step {reduction.step}, "
        f"position {position} differs between rank {first} and rank {leaders[first]}.\n"
        "  Give all nodes the same installation, data and tokenizer."
    )
