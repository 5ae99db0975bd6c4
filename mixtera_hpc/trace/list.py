"""Which samples a step consists of, and the proof that a run consumed them: offline, from the index and the journal alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.journal import AttemptRecord, History, read_lines
from mixtera_hpc.dataplane.plane_state import check_identity
from mixtera_hpc.dataplane.reading.batches import BatchMaker, BatchSlice
from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.run_edits import config_for_identity
from mixtera_hpc.errors import ConfigError, DataError

__all__ = [
    "AttemptSources",
    "VerifyResult",
    "planned_sequences",
    "read_audit",
    "sequences_of_plan",
    "served_sequences",
    "verify_run",
]

Record = dict[str, Any]


class AttemptSources:
    """The sources that the attempts of a run served from; one for every era."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._opened: dict[bytes, Source] = {}

    def of(self, attempt: AttemptRecord) -> Source:
        """What `attempt` served from.

        Raises:
            DataError: the index, the tokenizer or the settings are not those the attempt had.
        """
        key = msgspec.json.encode([attempt.identity, attempt.stream_version.to_dict()])
        if key not in self._opened:
            source = open_source(config_for_identity(self._config, attempt.identity), Local(), check=False)
            try:
                check_identity(attempt.identity, source.identity())
            except ConfigError as error:
                raise DataError(str(error).partition("\n  Resume")[0].replace("saved state", "journal")) from None
            self._opened[key] = source.at_version(attempt.stream_version)
        return self._opened[key]


def planned_sequences(source: Source, first_step: int, num_steps: int) -> Iterator[Record]:
    """The sequences of steps [first_step, first_step + num_steps) of a fresh run, in served order.

    Where weights are learned, these are the sequences that the ones it begins with would give. With `plan.digests` the data
    is read, and every record has the `digest` of its tokens or sample: the one that a run with `dataplane.audit` would log.
    """
    state, streams, mixer = PlannerState.start(source.num_domains), source.streams(), source.mixer(learn=False)
    steps = range(first_step, first_step + num_steps)
    maker = _maker(source) if source.config.plan.digests else None
    while state.step < first_step + num_steps and (weights := mixer.weights_of(state.chunk)) is not None:
        plan, state = source.planner.plan(state, weights)
        if state.step > first_step or plan.last:
            found = sequences_of_plan(source, streams, plan, steps)
            yield from _with_digests(maker, plan, steps, found) if maker else found
        if plan.last:
            return


def _maker(source: Source) -> BatchMaker:
    """Makes whole global batches."""
    return BatchMaker(source, BatchSlice(first=0, size=source.planner.global_batch_size), audit=True)


def _with_digests(maker: BatchMaker, plan: ChunkPlan, steps: range, records: Iterator[Record]) -> Iterator[Record]:
    """Records with the digests of the tokens they stand for."""
    for batch in maker.batches(plan, steps.start):
        if batch.step >= steps.stop:
            return
        for digest, record in zip(batch.digests or [], records, strict=False):
            yield record | {"digest": digest}


def served_sequences(source: Source, attempt: AttemptRecord, steps: range) -> Iterator[Record]:
    """The sequences that `steps` of an attempt consist of, in served order; `source` is the attempt's."""
    streams, step = source.streams(), steps.start
    while step < steps.stop:
        plan = attempt.plan_of(step)
        stop = min(steps.stop, source.stream_version.step_at(plan.first_step + plan.num_steps))
        yield from sequences_of_plan(source, streams, plan, range(step, stop))
        step = stop


def sequences_of_plan(source: Source, streams: DomainStreams, plan: ChunkPlan, steps: range) -> Iterator[Record]:
    """The sequences of those training steps of `plan` that are in `steps`.

    Each has `step`, `position`, `domain_id`, `epoch` (of its first item) and `pieces`: `[shard, row, start, end]` in tokens
    of the row, special tokens included.
    """
    slots, size, era = source.planner.slots(plan), source.planner.global_batch_size, source.stream_version
    last = era.step_at(plan.first_step + plan.num_steps)
    for step in range(max(steps.start, era.step_at(plan.first_step)), min(steps.stop, last)):
        base = (era.data_step(step) - plan.first_step) * size
        for position in range(size):
            domain, ordinal = int(slots.domain[base + position]), int(slots.ordinal[base + position])
            start, stop = source.span(domain, ordinal, 1)
            yield {
                "step": step,
                "position": position,
                "domain_id": domain,
                "epoch": streams.epoch_of(domain, start),
                "pieces": _pieces(source, streams.documents(domain, start, stop)),
            }


def _pieces(source: Source, documents: Documents) -> list[list[Any]]:
    blocks, paths = source.blocks, source.facts.shard_paths
    shards = [paths[s] for s in blocks.shard[documents.block].tolist()]
    rows = (blocks.first_row[documents.block] + documents.row).tolist()
    return [list(p) for p in zip(shards, rows, documents.first.tolist(), documents.last.tolist(), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What `verify_run` found."""

    num_steps: int
    """Steps proven, from the first of the run on."""
    num_sequences: int
    num_attempts: int
    unfinished_step: int | None
    """A step that the last attempt was killed in; no part of the proof."""


def verify_run(sources: AttemptSources, folder: RunFolder, history: History) -> VerifyResult:
    """Prove that every planned sequence of every step was consumed exactly once, across all attempts and surgeries.

    The tokens of every sequence, or the samples, are made again from the plan, the index and the data, and their digests
    compared with those of what the trainers were handed.

    Raises:
        DataError: the run was not audited, or a sequence was consumed not at all, twice, or with other tokens; the first
            such is named.
    """
    consumed = _Consumed(folder, history)
    end, unfinished = _extent(history, consumed)
    num_sequences = step = 0
    for attempt, steps in history.extents():
        consumed.check_audited(attempt, range(steps.start, min(steps.stop, end)))
        maker = _maker(sources.of(attempt))
        step, stop = steps.start, min(steps.stop, end)
        while step < stop:
            for batch in maker.batches(attempt.plan_of(step), step):
                if batch.step >= stop:
                    break
                consumed.check(batch.step, batch.digests or [])
                step, num_sequences = batch.step + 1, num_sequences + attempt.global_batch_size
        maker.close()
    if step < end:
        raise DataError(
            f"Steps {step} to {end - 1} were consumed, but the journal ends before step {step}: it has lost lines.\n"
            "  Bring the whole journal.jsonl back."
        )
    return VerifyResult(
        num_steps=end, num_sequences=num_sequences, num_attempts=len(history.attempts), unfinished_step=unfinished
    )


class _Consumed:
    """The audit logs of a run: by (attempt, step), the digests at each position."""

    def __init__(self, folder: RunFolder, history: History) -> None:
        self._history = history
        self._digests: dict[tuple[int, int], dict[int, list[str]]] = {}
        for attempt in history.attempts:
            for path in sorted(folder.audit(attempt.number).glob("rank_*.jsonl")):
                self._add(attempt.number, read_lines(path))
        if not self._digests:
            raise DataError(f"{folder.path} has no audit log. Run with dataplane.audit=true to be able to verify.")

    def _add(self, attempt: int, lines: Iterable[Record]) -> None:
        for line in lines:
            at = self._digests.setdefault((attempt, line["step"]), {})
            for position, digest in zip(line["positions"], line["digests"], strict=True):
                at.setdefault(position, []).append(digest)

    def count(self, step: int) -> int:
        """Sequences of `step` consumed by the attempt that counts."""
        return sum(len(d) for d in self._of(step).values())

    def check_audited(self, attempt: AttemptRecord, steps: range) -> None:
        """Say which attempt was not audited, rather than that it consumed nothing."""
        if len(steps) and self.last_step(attempt.number) < 0:
            raise DataError(
                f"Attempt {attempt.number}, of steps {steps.start} to {steps.stop - 1}, has no audit log, so nothing "
                "can be proven of them.\n  Train with dataplane.audit=true from the first step on."
            )

    def last_step(self, attempt: int) -> int:
        return max((step for number, step in self._digests if number == attempt), default=-1)

    def check(self, step: int, expected: list[str]) -> None:
        at, attempt = self._of(step), self._history.attempt_of(step).number
        for position, digest in enumerate(expected):
            got = at.get(position, [])
            if got != [digest]:
                raise DataError(
                    f"Step {step} position {position} (attempt {attempt}) {_fault(got, digest)}.\n"
                    f"  See which samples it has with mixtera-hpc trace RUN --step {step}."
                )

    def _of(self, step: int) -> dict[int, list[str]]:
        return self._digests.get((self._history.attempt_of(step).number, step), {})


def _fault(got: list[str], digest: str) -> str:
    if not got:
        return "was planned and not consumed"
    if len(got) > 1:
        return f"was consumed {len(got)} times"
    return f"was consumed with other tokens or another sample: digest {got[0]}, planned {digest}"


def _extent(history: History, consumed: _Consumed) -> tuple[int, int | None]:
    """One past the last step to prove, and the step the last attempt was killed in."""
    last = history.attempts[-1]
    if last.next_step is not None:
        return last.next_step, None
    end = max(consumed.last_step(last.number) + 1, last.first_step)
    unfinished = None
    while end > last.first_step and consumed.count(end - 1) < last.global_batch_size:
        end -= 1
        unfinished = end
    return end, unfinished


def read_audit(folder: RunFolder, attempt: int, steps: range) -> dict[tuple[int, int], str]:
    """(Step, position) → digest of the sequences of `steps` that an attempt consumed; empty when it was not audited."""
    lines = (line for path in sorted(folder.audit(attempt).glob("rank_*.jsonl")) for line in read_lines(path))
    found = [line for line in lines if line["step"] in steps]
    return {(line["step"], p): d for line in found for p, d in zip(line["positions"], line["digests"], strict=True)}
