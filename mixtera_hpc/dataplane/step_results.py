"""Pass the reduced results of steps on: to requests, the mixing algorithm, the records of the run, and the trainer."""

from collections import deque
from collections.abc import Sequence

from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.silence import SilenceWatch
from mixtera_hpc.dataplane.plans.mixture_feed import MixtureFeed
from mixtera_hpc.dataplane.recording.run_recorder import RunRecorder
from mixtera_hpc.dataplane.steps.flag_exchange import AgreedRequests
from mixtera_hpc.dataplane.steps.reduction.step_reducer import StepResult

__all__ = ["StepResults"]

MAX_UNREAD_STATISTICS = 1024
"""Statistics kept for a trainer that does not ask for them; the newest ones."""


class StepResults:
    """The results of steps on one rank, in order."""

    def __init__(self, rank: int, mixture: MixtureFeed, silence: SilenceWatch, recorder: RunRecorder) -> None:
        """Begin without results.

        Args:
            rank: this rank; the mixing algorithm runs on rank 0 only.
            mixture: gets the statistics.
            silence: counts the chunks without losses.
            recorder: records the statistics.
        """
        self._is_root = rank == 0
        self._mixture = mixture
        self._silence = silence
        self._recorder = recorder
        self.requests = AgreedRequests()
        """Requests to stop or save that came with the results."""
        self._unread: deque[DomainStatistics] = deque(maxlen=MAX_UNREAD_STATISTICS)
        self._reduce_s = 0.0
        """Seconds that this rank has waited for reductions since the last batch."""

    def add(self, results: Sequence[StepResult], log_before: int | None = None) -> None:
        """Pass results on; steps from `log_before` on are not logged, because a resume serves them again."""
        for result in results:
            # Results arrive in order of steps, which the mixing algorithm relies on.
            self.requests.add(result)
            self._reduce_s += result.reduce_s or 0.0
            self._silence.note_losses(result.statistics)
            if self._is_root:
                self._mixture.feed(result.statistics)
            self._unread.append(result.statistics)
            if log_before is None or result.statistics.step < log_before:
                self._recorder.log_reduction(result.statistics, result.reduce_s)

    def take_statistics(self) -> list[DomainStatistics]:
        """Return the statistics of the results since the last call, in order."""
        statistics = list(self._unread)
        self._unread.clear()
        return statistics

    def take_reduce_s(self) -> float:
        """Return the seconds that this rank has waited for reductions since the last call."""
        seconds = self._reduce_s
        self._reduce_s = 0.0
        return seconds
