"""Prove that a run consumed exactly what was planned: every planned sequence once, with the planned content.

The tokens of every sequence, or the samples, are made again from the plan, the index and the data. Their digests are
compared with those in the audit log, which holds what the trainers were handed. Price: all data of the run is read
once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord, History
from mixtera_hpc.errors import DataError
from mixtera_hpc.trace.audit_lines import read_audit_lines
from mixtera_hpc.trace.list import global_batch_maker
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = ["VerifyResult", "verify_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """Result of `verify_run`."""

    num_steps: int
    """Steps proven."""
    num_sequences: int
    num_attempts: int
    unfinished_step: int | None
    """The step in which the last attempt was killed; it is not part of the proof."""
    unproven_steps: tuple[tuple[int, int], ...] = ()
    """First and last step of each gap: lines of the journal or of an audit log are damaged, so nothing can be proven of
    these steps."""


def verify_run(run: ServedRun) -> VerifyResult:
    """Prove that every planned sequence was consumed exactly once, across all attempts and run edits.

    Raises:
        DataError: the run was not audited, or a sequence was not consumed, consumed twice, or consumed with other
            content; the message names the first such sequence.
    """
    history = run.history
    consumed = _ConsumedSequences(run.folder, history)
    end, unfinished = _proven_end(history, consumed)
    proof = _Proof(run, consumed)
    step = 0
    for attempt, served in history.extents():
        steps = range(served.start, min(served.stop, end))
        consumed.check_audited(attempt, steps)
        proof.compare(attempt, steps)
        step = steps.stop

    if step < end:
        raise DataError(
            f"Steps {step} to {end - 1} were consumed, but the journal ends before step {step}: it has lost lines.\n"
            "  Restore the whole journal.jsonl."
        )
    return VerifyResult(
        num_steps=end - len(proof.unproven),
        num_sequences=proof.num_sequences,
        num_attempts=len(history.attempts),
        unfinished_step=unfinished,
        unproven_steps=_runs(proof.unproven),
    )


class _Proof:
    """Makes the planned steps again and compares them with the consumed ones."""

    def __init__(self, run: ServedRun, consumed: "_ConsumedSequences") -> None:
        self._run = run
        self._consumed = consumed
        self.num_sequences = 0
        self.unproven: list[int] = []
        """Steps of which a plan or a digest is lost."""

    def compare(self, attempt: AttemptRecord, steps: range) -> None:
        """Compare `steps` of an attempt.

        Raises:
            DataError: names the first sequence that differs.
        """
        # Each chunk is made again from its plan; `step` is the first step that is not compared yet.
        maker = global_batch_maker(self._run.source_of(attempt))
        step = steps.start
        while step < steps.stop:
            if self._run.history.damaged_lines and not attempt.has_plan_of(step):
                self.unproven.append(step)
                step += 1
                continue
            for batch in maker.batches(attempt.plan_of(step), step):
                if batch.step >= steps.stop:
                    break
                self._compare_batch(batch)
                step = batch.step + 1
        maker.close()

    def _compare_batch(self, batch: Batch) -> None:
        if not self._consumed.is_comparable(batch.step):
            self.unproven.append(batch.step)
            return
        self._consumed.check_step(batch.step, batch.digests or [])
        self.num_sequences += int((~batch.is_padding).sum())


class _ConsumedSequences:
    """The audit logs of a run: (attempt, step) → the digests at each position."""

    def __init__(self, folder: RunFolder, history: History) -> None:
        self._history = history
        # A list of digests for each position, to notice a sequence that was consumed twice.
        self._digests: dict[tuple[int, int], dict[int, list[str]]] = {}
        self._damaged_attempts: set[int] = set()
        """Attempts whose audit logs have damaged lines."""
        for attempt in history.attempts:
            for path in folder.audit_files(attempt.number):
                damaged: list[int] = []
                self._add(attempt.number, read_audit_lines(path, damaged))
                if damaged:
                    self._damaged_attempts.add(attempt.number)
        if not self._digests:
            raise DataError(f"{folder.path} has no audit log. Run with dataplane.audit=true to be able to verify.")

    def _add(self, attempt: int, lines: Iterable[Record]) -> None:
        for line in lines:
            positions = self._digests.setdefault((attempt, line["step"]), {})
            for position, digest in zip(line["positions"], line["digests"], strict=True):
                positions.setdefault(position, []).append(digest)

    def count(self, step: int) -> int:
        """Return the number of sequences of `step` consumed by the attempt that counts."""
        return sum(len(digests) for digests in self._digests_of(step).values())

    def check_audited(self, attempt: AttemptRecord, steps: range) -> None:
        """Refuse an attempt without an audit log, which would look like one that consumed nothing."""
        if len(steps) and self.last_step(attempt.number) < 0:
            raise DataError(
                f"Attempt {attempt.number}, of steps {steps.start} to {steps.stop - 1}, has no audit log, so nothing "
                "can be proven of them.\n  Train with dataplane.audit=true from the first step on."
            )

    def last_step(self, attempt: int) -> int:
        """Return the last step that `attempt` consumed a sequence of; -1 if it has no audit log."""
        return max((step for number, step in self._digests if number == attempt), default=-1)

    def is_comparable(self, step: int) -> bool:
        """Return False if a damaged line may have held digests of `step`: some of its positions have none."""
        attempt = self._history.attempt_of(step)
        is_complete = len(self._digests_of(step)) == attempt.batch_size_of(step)
        return is_complete or attempt.number not in self._damaged_attempts

    def check_step(self, step: int, expected: list[str]) -> None:
        """Compare the digests of one step with the planned ones, in order of positions."""
        positions = self._digests_of(step)
        attempt = self._history.attempt_of(step).number
        for position, digest in enumerate(expected):
            # Exactly one digest: a sequence that two ranks consumed has two.
            actual = positions.get(position, [])
            if actual != [digest]:
                raise DataError(
                    f"Step {step} position {position} (attempt {attempt}) {_fault(actual, digest)}.\n"
                    f"  See which samples it has with mixtera-hpc trace RUN --step {step}."
                )

    def _digests_of(self, step: int) -> dict[int, list[str]]:
        return self._digests.get((self._history.attempt_of(step).number, step), {})


def _runs(steps: list[int]) -> tuple[tuple[int, int], ...]:
    """Return the first and the last step of each run of consecutive steps; `steps` ascend."""
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - 1:
            runs[-1] = (runs[-1][0], step)
        else:
            runs.append((step, step))
    return tuple(runs)


def _fault(actual: list[str], digest: str) -> str:
    """Return what is wrong with the digests logged for one position."""
    if not actual:
        return "was planned and not consumed"
    if len(actual) > 1:
        return f"was consumed {len(actual)} times"
    return f"was consumed with other tokens or another sample: digest {actual[0]}, planned {digest}"


def _proven_end(history: History, consumed: _ConsumedSequences) -> tuple[int, int | None]:
    """Return one past the last step to prove, and the step in which the last attempt was killed, if any."""
    last = history.attempts[-1]
    if last.next_step is not None:
        return last.next_step, None
    # A killed attempt logs no end. Its last steps count as far as all of their sequences were consumed.
    end = max(consumed.last_step(last.number) + 1, last.first_step)
    unfinished = None
    while end > last.first_step and consumed.count(end - 1) < last.batch_size_of(end - 1):
        end -= 1
        unfinished = end
    return end, unfinished
