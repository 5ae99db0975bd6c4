"""List the samples that a step consists of: offline, from the index and the journal alone."""

from collections.abc import Container, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord, History
from mixtera_hpc.errors import ConfigError, DataError, did_you_mean
from mixtera_hpc.trace.audit_lines import read_audit_lines
from mixtera_hpc.trace.rank_filter import check_rank, is_served_to
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = [
    "SequenceFilter",
    "audited_digests",
    "domain_id",
    "global_batch_maker",
    "list_sequences",
    "planned_sequences",
    "sequences_of_plan",
    "served_sequences",
    "wanted_extents",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFilter:
    """Filter of the served sequences to list; None does not restrict."""

    steps: range | None = None
    rank: int | None = None
    domain: str | None = None
    """Name or domain_id."""
    shard: str | None = None
    """Path of a shard; lists the sequences that hold tokens or samples of it."""


def list_sequences(run: ServedRun, wanted: SequenceFilter) -> Iterator[tuple[Record, list[str]]]:
    """Yield the served sequences that pass a filter, each with the names of the domains.

    A record has the fields of `sequences_of_plan` and the `rank`; with an audit log also the `digest`.

    Raises:
        DataError: the run has not served the steps, or the index has no such shard.
        ConfigError: the run has no such rank or domain.
    """
    extents = wanted_extents(run.history, wanted)

    for attempt, own in extents:
        source = run.source_of(attempt)
        _check_shard(wanted.shard, source)
        domain = None if wanted.domain is None else domain_id(wanted.domain, source.names)
        for record in _records_with_ranks(source, run.folder, attempt, own):
            shards = [shard for shard, _, _, _ in record["segments"]]
            if (
                is_served_to(wanted.rank, attempt, record)
                and domain in (None, record["domain_id"])
                and wanted.shard in (None, *shards)
            ):
                yield record, source.names


def wanted_extents(history: History, wanted: SequenceFilter) -> list[tuple[AttemptRecord, range]]:
    """Return every attempt with the steps of it that count and are wanted, without attempts that have none.

    Raises:
        DataError: the run has not served the steps.
        ConfigError: no attempt had such a rank.
    """
    steps = _check_steps(wanted.steps, history.end)
    extents = [
        (attempt, range(max(served.start, steps.start), min(served.stop, steps.stop)))
        for attempt, served in history.extents()
    ]
    extents = [(attempt, own) for attempt, own in extents if len(own)]
    check_rank(wanted.rank, [attempt for attempt, _ in extents])
    return extents


def _check_steps(steps: range | None, end: int) -> range:
    """Return the steps to list; refuse steps that the run has not served."""
    if steps is None:
        return range(end)
    if steps.stop > end or steps.start < 0:
        raise DataError(f"Step {steps.stop - 1} has not been served: the run has {end} steps so far.")
    return steps


def _check_shard(shard: str | None, source: Source) -> None:
    """Refuse a shard that the index does not have."""
    paths = source.index.shard_paths
    if shard is not None and shard not in paths:
        raise DataError(f"The index has no shard {shard!r}.{did_you_mean(shard, paths)}")


def domain_id(text: str, names: list[str]) -> int:
    """Return the domain_id that a name or a number stands for."""
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ConfigError(f"{text!r} is not a domain of this run.{did_you_mean(text, names)}")


def _records_with_ranks(source: Source, folder: RunFolder, attempt: AttemptRecord, steps: range) -> Iterator[Record]:
    """Yield the served sequences with their ranks and, where an audit log has them, their digests."""
    digests = audited_digests(folder, attempt.number, steps)
    for record in served_sequences(source, attempt, steps):
        record["rank"] = attempt.rank_of(record["step"], record["position"])
        if (digest := digests.get((record["step"], record["position"]))) is not None:
            record["digest"] = digest
        yield record


def audited_digests(folder: RunFolder, attempt: int, steps: Container[int]) -> dict[tuple[int, int], str]:
    """Return (step, position) → digest of the sequences that an attempt consumed; empty if it was not audited."""
    # Every rank has its own log.
    digests = {}
    for path in folder.audit_files(attempt):
        for line in read_audit_lines(path, damaged=[]):
            if line["step"] in steps:
                pairs = zip(line["positions"], line["digests"], strict=True)
                digests.update({(line["step"], position): digest for position, digest in pairs})
    return digests


MAX_PLANNED_CHUNKS = 200_000
"""Chunks that are planned to reach the first listed step; a chunk costs about 50 µs."""


def planned_sequences(source: Source, first_step: int, num_steps: int) -> Iterator[Record]:
    """Yield the sequences of steps [first_step, first_step + num_steps) of a new run, in served order.

    If weights are learned, these are the sequences that the initial weights would give. With `plan.digests` the data is
    read, and every record has the `digest` of its tokens or sample that a run with `dataplane.audit` would log.

    Raises:
        ConfigError: `first_step` lies after more chunks than this is for.
    """
    chunk_steps = source.planner.chunk_steps
    if first_step > MAX_PLANNED_CHUNKS * chunk_steps:
        raise ConfigError(
            f"plan.first_step is {first_step}, but at most {MAX_PLANNED_CHUNKS * chunk_steps} steps are planned ahead: "
            f"{MAX_PLANNED_CHUNKS} chunks of dataplane.chunk_steps={chunk_steps}, because cursors depend on all chunks "
            "before.\n"
            "  List the steps of an existing run with mixtera-hpc trace RUN --step S: its journal has the cursors."
        )
    state = PlannerState.start(source.num_domains)
    documents = SequenceDocuments(source, source.streams())
    mixer = source.mixer(learn=False)
    steps = range(first_step, first_step + num_steps)
    digests = source.config.plan.digests
    with closing(global_batch_maker(source)) if digests else nullcontext() as maker:
        while state.step < steps.stop and (weights := mixer.weights_of(state.chunk)) is not None:
            # Plan all chunks from the first one on, because cursors depend on them, but expand only those asked for.
            plan, state = source.planner.plan(state, source.without_dropped_domains(weights))
            if state.step > first_step or plan.last:
                records = sequences_of_plan(source, documents, plan, steps)
                yield from _with_digests(maker, plan, steps, records) if maker else records
            if plan.last:
                return


def global_batch_maker(source: Source) -> BatchMaker:
    """Build a maker of whole global batches with digests, and with samples as they are in the data."""
    return BatchMaker(source, BatchSlice(), audit=True, raw=True, compare_every_read=True)


def _with_digests(maker: BatchMaker, plan: ChunkPlan, steps: range, records: Iterator[Record]) -> Iterator[Record]:
    """Yield `records` with the digests of their tokens or samples."""
    for batch in maker.batches(plan, steps.start):
        if batch.step >= steps.stop:
            return
        for digest, record in zip(batch.digests or [], records, strict=False):
            yield record | {"digest": digest}


def served_sequences(source: Source, attempt: AttemptRecord, steps: range) -> Iterator[Record]:
    """Yield the sequences of `steps` of an attempt, in served order; `source` is the source of the attempt."""
    documents = SequenceDocuments(source, source.streams())
    step = steps.start
    # One chunk after the other; a chunk may end in the middle of a skip.
    while step < steps.stop:
        plan = attempt.plan_of(step)
        stop = min(steps.stop, source.stream_version.step_at(plan.first_step + plan.num_steps))
        yield from sequences_of_plan(source, documents, plan, range(step, stop))
        step = stop


def sequences_of_plan(source: Source, documents: SequenceDocuments, plan: ChunkPlan, steps: range) -> Iterator[Record]:
    """Yield the sequences of those training steps of `plan` that are in `steps`.

    A record has `step`, `position`, `domain_id`, `epoch` (of the first item) and `segments`: a list of
    `[shard, row, start, end]` in tokens of the row, special tokens included.
    """
    slots = slots_of_plan(source, plan, documents)
    sequences = source.lanes.sequence(slots.domain, slots.ordinal)
    schedule = source.planner.batch_schedule
    epoch_items = source.layout.epoch_items()
    version = source.stream_version
    first = max(steps.start, version.step_at(plan.first_step))
    stop = min(steps.stop, version.step_at(plan.first_step + plan.num_steps))
    for step in range(first, stop):
        # Plans count data steps, which include the steps that `resume --skip-steps` skipped.
        data_step = version.data_step(step)
        first_slot = schedule.slots(plan.first_step, data_step)
        size = schedule.size_at(data_step)
        # The last step may have fewer sequences.
        for position, slot in enumerate(range(first_slot, min(first_slot + size, len(slots.domain)))):
            domain = int(slots.domain[slot])
            start, _ = source.span(domain, int(sequences[slot]), 1)
            yield {
                "step": step,
                "position": position,
                "domain_id": domain,
                "epoch": start // int(epoch_items[domain]),
                "segments": _segments(
                    source, documents.documents(slots.domain[slot : slot + 1], sequences[slot : slot + 1])
                ),
            }


def _segments(source: Source, documents: Documents) -> list[list[object]]:
    """Return `[shard, row, start, end]` of documents."""
    blocks = source.blocks
    paths = source.index.shard_paths
    shards = [paths[shard] for shard in blocks.shard[documents.block].tolist()]
    rows = (blocks.first_row[documents.block] + documents.row).tolist()
    columns = zip(shards, rows, documents.first.tolist(), documents.last.tolist(), strict=True)
    return [list(segment) for segment in columns]
