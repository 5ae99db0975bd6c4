"""The bookkeeping of steps: what was served, what all ranks know, and what the mixing algorithm has learned from.

Two counts exist. A *training step* is one optimizer update. A *data step* is one global batch of the chunk plans. They
are equal until `resume --skip-steps` skips data; `StreamVersion` converts between them.

While the trainer works on step s, these are the neighbouring steps:

    step      losses                                            in terms of `next_step`
    s - 1     their reduction has started, it may be running    next_step - 2
    s         being recorded                                    next_step - 1
    s + 1     its batch may be read already                     next_step

The reduction of a step starts when the trainer asks for the next batch. While it works on step s, step s - 1 is
therefore the newest one whose result every rank can wait for without a hang. Ranks must agree on it before they act on
a request.
"""

from collections.abc import Iterator

from mixtera_hpc.dataplane.resume.resume_point import ResumePoint
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion

__all__ = ["StepLedger"]


class StepLedger:
    """Progress of one rank in its run. All counters only grow."""

    def __init__(
        self, version: StreamVersion, chunk_steps: int, *, next_step: int, current_chunk: int, num_fed: int
    ) -> None:
        """Begin at a resume point.

        Args:
            next_step: the first training step to serve.
            current_chunk: the last chunk whose steps were all served before it; -1 for none.
            num_fed: data steps that the mixing algorithm's state contains.
        """
        self._version = version
        self._chunk_steps = chunk_steps
        self._next_step = next_step
        self._current_chunk = current_chunk
        self._num_reduced = next_step
        """All training steps below it have been reduced, or their effect is part of the loaded state."""
        self._num_fed = num_fed
        """All data steps below it have been passed to the mixing algorithm."""

    @classmethod
    def at_resume(cls, version: StreamVersion, chunk_steps: int, start: ResumePoint, num_fed: int) -> "StepLedger":
        """Return the ledger of a rank that continues at `start`."""
        plan = start.plan
        is_served = plan.num_steps > 0 and version.data_step(start.step) >= plan.first_step + plan.num_steps
        return cls(
            version,
            chunk_steps,
            next_step=start.step,
            current_chunk=plan.chunk if is_served else plan.chunk - 1,
            num_fed=num_fed,
        )

    @property
    def next_step(self) -> int:
        """The training step of the next batch."""
        return self._next_step

    @property
    def current_step(self) -> int:
        """The training step of the batch that was served last."""
        return self._next_step - 1

    @property
    def last_common_step(self) -> int:
        """The newest training step whose reduction every rank has started; see the table above."""
        return self._next_step - 2

    @property
    def current_chunk(self) -> int:
        """The chunk of the batch that was served last."""
        return self._current_chunk

    @property
    def next_data_step(self) -> int:
        """The data step of the next batch."""
        return self._version.data_step(self._next_step)

    @property
    def last_chunk_to_plan(self) -> int:
        """The newest chunk that may be planned now.

        That is one chunk beyond the current one, so that it is broadcast while the current one is trained on. Where
        skipped data steps cover whole chunks, it is the chunk of the next batch, because chunks are planned one after
        the other.
        """
        # `next_data_step` lies in the current chunk or the one after it, unless data steps are skipped.
        return max(self._current_chunk + 1, self.next_data_step // self._chunk_steps)

    @property
    def num_fed(self) -> int:
        """Number of data steps that the mixing algorithm has seen; all of them lie at the beginning of the run."""
        return self._num_fed

    @property
    def first_unknown_data_step(self) -> int:
        """The first data step whose statistics are still to come; those before it were reduced or skipped."""
        return self._version.data_step(self._num_reduced)

    def serve(self, step: int, chunk: int) -> None:
        """Record that the batch of training step `step` was handed to the trainer."""
        # Steps are served without gaps, so one number describes what was served.
        self._next_step = step + 1
        self._current_chunk = chunk

    def feed(self, step: int) -> int:
        """Record that the statistics of training step `step` go to the mixing algorithm; return its data step."""
        data_step = self._version.data_step(step)
        # Training steps and data steps advance together here: this is the only place that counts both.
        self._num_reduced = step + 1
        self._num_fed = data_step + 1
        return data_step

    def feed_skipped(self, data_step: int) -> Iterator[int]:
        """Yield the data steps before `data_step` that no training step takes, and record each one as fed."""
        # Data steps in between were skipped: those that training steps take have been fed by `feed`.
        while self._num_fed < data_step:
            yield self._num_fed
            self._num_fed += 1

    def data_step(self, step: int) -> int:
        """Return the data step whose data training step `step` takes."""
        return self._version.data_step(step)
