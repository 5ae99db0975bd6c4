"""Find the sequences with the highest losses, and the documents that they consist of.

Reads the loss logs of the wanted steps. Only the few sequences that are found are looked up in the index, so the price
is 4 bytes per sequence and copy; with a domain, also the slots of the chunks that the candidates lie in; with a shard,
all sequences of the wanted steps are looked up.
"""

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.dataplane.recording.loss_log import RecordedLosses, read_losses
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.trace.list import (
    SequenceFilter,
    audited_digests,
    domain_id,
    list_sequences,
    served_sequences,
    wanted_extents,
)
from mixtera_hpc.trace.rank_filter import is_served_to
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = ["WorstSequences", "worst_sequences", "write_documents"]

CHUNKS_IN_MEMORY = 256
"""Chunks whose slots are kept while candidates are looked up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstSequences:
    """The result of `worst_sequences`."""

    sequences: list[tuple[Record, list[str]]]
    """Records with the highest loss first, each with the names of the domains."""
    num_steps: int
    """Wanted steps."""
    num_recorded: int
    """Sequences with a recorded loss in these steps, in all domains."""
    incomplete_steps: list[int]
    """Wanted steps of which not all losses were recorded."""


def worst_sequences(run: ServedRun, wanted: SequenceFilter, count: int) -> WorstSequences:
    """Return the `count` sequences with the highest mean loss among those that pass a filter.

    A record has the fields of `list_sequences` and the `loss`: the mean over the counted tokens in nats, infinite if it
    was not finite. Among equal losses the earlier step and lower position come first.

    Args:
        run: the run.
        wanted: steps, rank, domain and shard.
        count: at least 1.

    Raises:
        ConfigError: the run has no such rank or domain.
        DataError: the run has not served the steps, or no losses of them were recorded.
    """
    extents = wanted_extents(run.history, wanted)
    selection = _HighestLosses(count)
    of_shard = _positions_of_shard(run, wanted)
    num_positions: Counter[int] = Counter()
    for attempt, steps in extents:
        has_domain = _domain_test(run, attempt, wanted.domain)
        is_wanted = has_domain if of_shard is None else functools.partial(_is_one_of, of_shard)
        for losses in _read_once(run.folder, attempt, steps, wanted.rank):
            num_positions[losses.step] += len(losses.means)
            selection.add(losses, is_wanted)

    all_steps = list(itertools.chain.from_iterable(steps for _, steps in extents))
    if not num_positions:
        raise _no_losses_error(run, all_steps)
    return WorstSequences(
        sequences=list(_look_up(run, extents, selection)),
        num_steps=len(all_steps),
        num_recorded=selection.num_seen,
        incomplete_steps=_incomplete_steps(extents, num_positions, wanted.rank),
    )


def write_documents(path: Path, sequences: list[tuple[Record, list[str]]]) -> int:
    """Write shard and row of every document of `sequences` as JSONL, each once; return their number.

    Raises:
        ConfigError: the file cannot be written.
    """
    segments = itertools.chain.from_iterable(record["segments"] for record, _ in sequences)
    documents = list(dict.fromkeys((shard, row) for shard, row, _, _ in segments))
    lines = [msgspec.json.encode({"shard": shard, "row": row}) + b"\n" for shard, row in documents]
    try:
        path.write_bytes(b"".join(lines))
    except OSError as error:
        raise ConfigError(f"--write is {str(path)!r}, which cannot be written: {error.strerror}.") from None
    return len(documents)


class _HighestLosses:
    """The highest losses so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.entries: list[tuple[float, int, int]] = []
        """(-loss, step, position), ascending."""
        self.num_seen = 0

    def add(self, losses: RecordedLosses, is_wanted: Callable[[int, int], bool]) -> None:
        """Add the losses of one rank and step; sequences without a loss are left out."""
        self.num_seen += int(np.count_nonzero(~np.isnan(losses.means)))
        # Most steps have no loss that is high enough. NaN compares false.
        bound = -self.entries[-1][0] if len(self.entries) == self._count else -np.inf
        for row in np.flatnonzero(losses.means >= bound).tolist():
            position = losses.first + row
            if is_wanted(losses.step, position):
                bisect.insort(self.entries, (-float(losses.means[row]), losses.step, position))
                del self.entries[self._count :]


def _read_once(folder: RunFolder, attempt: AttemptRecord, steps: range, rank: int | None) -> Iterator[RecordedLosses]:
    """Yield the losses of `steps`, those of each model-parallel group once."""
    steps_read: dict[int, set[int]] = {}
    for writer in folder.ranks_with_losses(attempt.number):
        # An attempt that was opened again with fewer ranks has files of ranks that no longer count.
        if writer >= attempt.num_ranks or not is_served_to(rank, attempt, {"rank": attempt.leader_of(writer)}):
            continue
        path = folder.losses_of_rank(attempt.number, writer)
        # If an attempt served a step twice, the second time counts.
        by_step = {losses.step: losses for losses in read_losses(path) if losses.step in steps}
        # Ranks of a group record copies; those of the first one count.
        of_group = steps_read.setdefault(attempt.leader_of(writer), set())
        yield from (losses for step, losses in by_step.items() if step not in of_group)
        of_group.update(by_step)


def _positions_of_shard(run: ServedRun, wanted: SequenceFilter) -> set[tuple[int, int]] | None:
    """Return step and position of every sequence that passes a filter with a shard; None without a shard."""
    if wanted.shard is None:
        return None
    records = list_sequences(run, wanted)
    return {(record["step"], record["position"]) for record, _ in records}


def _is_one_of(chosen: Container[tuple[int, int]], step: int, position: int) -> bool:
    return (step, position) in chosen


def _domain_test(run: ServedRun, attempt: AttemptRecord, domain: str | None) -> Callable[[int, int], bool]:
    """Return a function of step and position that says whether an attempt served a sequence of `domain` there."""
    if domain is None:
        return lambda step, position: True
    source = run.source_of(attempt)
    wanted = domain_id(domain, source.names)
    plans = {plan.first_step: plan for plan in attempt.plans}

    @functools.lru_cache(maxsize=CHUNKS_IN_MEMORY)
    def is_of_domain(first_step: int) -> np.ndarray:
        return np.equal(slots_of_plan(source, plans[first_step]).domain, wanted)

    def has_domain(step: int, position: int) -> bool:
        first_step = attempt.plan_of(step).first_step
        # Plans count data steps, which include the steps that `resume --skip-steps` skipped.
        data_step = source.stream_version.data_step(step)
        slot = source.planner.batch_schedule.slots(first_step, data_step) + position
        return bool(is_of_domain(first_step)[slot])

    return has_domain


def _look_up(
    run: ServedRun,
    extents: list[tuple[AttemptRecord, range]],
    selection: _HighestLosses,
) -> Iterator[tuple[Record, list[str]]]:
    """Yield the records of the selected sequences, highest loss first, each with the names of the domains."""
    chosen = {(step, position): -negative for negative, step, position in selection.entries}
    found: dict[tuple[int, int], tuple[Record, list[str]]] = {}
    for attempt, steps in extents:
        own_steps = sorted({step for step, _ in chosen if step in steps})
        digests = audited_digests(run.folder, attempt.number, own_steps) if own_steps else {}
        for step in own_steps:
            source = run.source_of(attempt)
            for record in served_sequences(source, attempt, range(step, step + 1)):
                key = (step, record["position"])
                if key in chosen:
                    record |= {"rank": attempt.rank_of(*key), "loss": chosen[key]}
                    found[key] = (record | ({"digest": digests[key]} if key in digests else {}), source.names)
    return (found[key] for key in chosen)


def _incomplete_steps(
    extents: list[tuple[AttemptRecord, range]], num_positions: Counter[int], rank: int | None
) -> list[int]:
    """Return the steps of which fewer losses were read than there are sequences, padding included."""
    missing = []
    for attempt, steps in extents:
        num_groups = attempt.num_ranks // attempt.model_parallel_size
        sharers = 1 if rank is None else num_groups
        missing += [step for step in steps if num_positions[step] < attempt.batch_size_of(step) // sharers]
    return missing


def _no_losses_error(run: ServedRun, steps: list[int]) -> DataError:
    has_log = any(run.folder.ranks_with_losses(attempt.number) for attempt in run.history.attempts)
    what = f"has recorded losses, but none of steps {steps[0]} to {steps[-1]}" if has_log else "has recorded no losses"
    return DataError(
        f"{run.folder.run_id} {what}.\n"
        "  Train with dataplane.record_losses=true, and call plane.record(batch, loss) in your own training loop."
    )
