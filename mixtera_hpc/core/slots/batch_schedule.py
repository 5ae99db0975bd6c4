"""The sizes of the global batches of a run: one size, or a batch ramp whose stages begin at given data steps."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BatchSchedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSchedule:
    """The number of sequences of every data step. Sequences are counted from data step 0."""

    starts: tuple[int, ...]
    """First data step of every stage, ascending; the first one is 0."""
    sizes: tuple[int, ...]
    """Sequences per step of every stage."""

    @classmethod
    def constant(cls, size: int) -> "BatchSchedule":
        """Return a schedule of one size."""
        return cls(starts=(0,), sizes=(size,))

    @classmethod
    def ramp(cls, size: int, stages: Sequence[tuple[int, int]]) -> "BatchSchedule":
        """Return a schedule that begins with `size`; `stages` are pairs of a first data step, above 0, and a size."""
        return cls(starts=(0, *(start for start, _ in stages)), sizes=(size, *(size for _, size in stages)))

    @property
    def largest(self) -> int:
        """The largest size of all stages."""
        return max(self.sizes)

    def size_at(self, step: int) -> int:
        """Return the sequences of data step `step`."""
        return self.sizes[self._stage_at(step)]

    def stages_from(self, step: int) -> tuple[int, ...]:
        """Return the sizes of the stage that data step `step` belongs to and of all later stages."""
        return self.sizes[self._stage_at(step) :]

    def sequences_before(self, step: int) -> int:
        """Return the sequences of all data steps before `step`."""
        if len(self.sizes) == 1:
            return step * self.sizes[0]
        ends = (*self.starts[1:], step)
        stages = zip(self.starts, ends, self.sizes, strict=True)
        return sum((min(end, step) - start) * size for start, end, size in stages if start < step)

    def slots(self, first_step: int, step: int) -> int:
        """Return the sequences of the data steps from `first_step` on, before `step`."""
        return self.sequences_before(step) - self.sequences_before(first_step)

    def locate(self, sequence: int) -> tuple[int, int]:
        """Return the data step that sequence number `sequence` of the run belongs to, and its position in the batch."""
        first = 0
        for start, end, size in zip(self.starts, self.starts[1:], self.sizes, strict=False):
            num_sequences = (end - start) * size
            if sequence < first + num_sequences:
                break
            first += num_sequences
        else:
            start = self.starts[-1]
            size = self.sizes[-1]
        steps, position = divmod(sequence - first, size)
        return start + steps, position

    def locate_in(self, first_step: int, slot: int) -> tuple[int, int]:
        """Return the data step and the position of slot number `slot`, counted from the first slot of `first_step`."""
        return self.locate(self.sequences_before(first_step) + slot)

    def _stage_at(self, step: int) -> int:
        return bisect.bisect_right(self.starts, step) - 1
