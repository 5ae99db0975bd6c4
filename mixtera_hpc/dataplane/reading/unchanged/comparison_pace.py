"""Bound the time that comparisons of files take.

A comparison looks up every file that was read: about 2 µs per file on a local disk, 0.1 ms or more on a parallel file
system. Reads may follow each other within milliseconds, in loops that only ask for batches. So the next comparison is
due 19 times the duration of the last one after its end, and comparisons take at most 5 % of the time. While a training
reads once per second, every read is compared before its batches are delivered.
"""

import time
from collections.abc import Callable

__all__ = ["ComparisonPace"]

PAUSE_PER_DURATION = 19.0
"""Length of the pause after a comparison, as a multiple of its duration: comparisons take 1 / 20 of the time."""
MAX_PAUSE_S = 10.0
"""The longest pause. It ends the bound of 5 % where a comparison takes more than half a second."""
LATE_S = 0.005
"""Reads that are this much later than the end of a pause are slow enough for another comparison before them."""


class ComparisonPace:
    """Decides when the files that were read are compared again. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a comparison that is due at once; `clock` returns seconds."""
        self._clock = clock
        self._next_s = 0.0
        self._skipped_s: float | None = None
        """Time of the first check since the last comparison that did not compare; None if there was none."""
        self.every_read = False
        """True if every check compares."""

    def is_due(self) -> bool:
        """Return True if a check compares; else record that it did not."""
        if self.every_read:
            return True
        now_s = self._clock()
        if now_s >= self._next_s:
            return True
        if self._skipped_s is None:
            self._skipped_s = now_s
        return False

    def is_late(self) -> bool:
        """Return True if a comparison has been due for a long time, so that files may have changed since the last."""
        return self._clock() >= self._next_s + LATE_S

    def measure(self, compare: Callable[[], None], *, is_before_read: bool = False) -> None:
        """Call `compare`. Unless it raises, or comes before a read, the next comparison is due after a pause."""
        began_s = self._clock()
        compare()
        self._skipped_s = None
        if not is_before_read:
            ended_s = self._clock()
            self._next_s = ended_s + min(PAUSE_PER_DURATION * (ended_s - began_s), MAX_PAUSE_S)

    def exposure(self) -> str:
        """Return a sentence that says which batches may hold changed data, if a comparison finds a change."""
        if self._skipped_s is None:
            return "No batch with changed data was served."
        seconds = self._clock() - self._skipped_s
        return f"Batches that were served during the last {seconds:.2g} s may hold changed data."
