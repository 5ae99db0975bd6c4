"""The wait of one rank for its next batch: for its own reading, and for the ranks that do not have theirs yet."""

import queue
import time
from collections.abc import Callable, Mapping

from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.delivery.batch_feed import BatchFeed
from mixtera_hpc.dataplane.steps.flag_exchange import FlagExchange
from mixtera_hpc.dataplane.steps.ready_agreement import NO_LIMIT, OpenRequests, RankPosition, ReadyAgreement
from mixtera_hpc.dataplane.watchdog.progress import AGREE, RankProgress

__all__ = ["POLL_S", "BatchWait", "describe_interrupt"]

POLL_S = 5e-4
"""Time between two tests of plans and reductions while this rank waits for a plan, and at first for data."""
MAX_READ_POLL_S = 2e-3
"""The longest interval while it waits for its own reading, which takes work from the trainer's thread."""
LONE_READ_POLL_S = 2e-2
"""The interval if there is no other rank: no message can arrive, and one test of everything takes 0.1 ms."""
FIRST_POLL_S = 5e-5
"""The first interval while it waits for other ranks, which usually takes as long as a message; grows to `POLL_S`."""
GROWTH = 1.2
"""Factor between one interval and the next."""


class BatchWait:
    """The batches of one rank, each handed out when every rank holds its own."""

    def __init__(self, feed: BatchFeed, agreement: ReadyAgreement, flags: FlagExchange, progress: RankProgress) -> None:
        """Hold no batch yet.

        Args:
            feed: what this rank gets its batches from.
            agreement: which batches all ranks hold.
            flags: the requests that this rank has seen.
            progress: where this rank is, for the watchdog.
        """
        self._feed = feed
        self._flags = flags
        self._progress = progress
        self._agreement = agreement
        self._held: tuple[Batch | None] | None = None
        """The batch of the next step, or the end of the data, if it was taken from the feed."""
        self._waiting_since: float | None = None
        """Time at which the wait for the next batch began; requests may have ended the wait in between."""
        self.read_wait_s = 0.0
        """Seconds that the last call of `next` waited for this rank's own reading."""
        self.plan_wait_s = 0.0
        """Seconds that it waited for a plan."""

    def advance(self, next_step: int) -> None:
        """Pass on what is ready, and tell the other ranks; does not block."""
        self._feed.advance()
        if self._agreement.has_peers and self._agreement.needs_offer(next_step):
            self._agreement.offer(self._position(next_step))

    def next(
        self, next_step: int, has_unfinished: bool, poll: Callable[[], bool], pauses_to_save: bool
    ) -> Batch | OpenRequests | None:
        """Return the batch of `next_step`, None after the end of the data, or the requests that end the wait.

        **Collective.**

        Args:
            next_step: the step after that of the last call, unless that one was ended by requests.
            has_unfinished: whether the trainer holds batches.
            poll: drives plans and reductions; returns whether the plan of `next_step` is there.
            pauses_to_save: whether a request to save ends the wait, too.
        """
        self.read_wait_s = self.plan_wait_s = 0.0
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        pause_s = FIRST_POLL_S
        read_pause_s = POLL_S if self._agreement.has_peers else LONE_READ_POLL_S
        while True:
            # First the statistics: the weights of the next chunk may wait for them.
            is_planned = poll()
            if self._held is None:
                self._hold(is_planned, read_pause_s if is_planned else POLL_S)
                if self._agreement.has_peers:
                    read_pause_s = min(read_pause_s * GROWTH, MAX_READ_POLL_S)
            if self._held is not None and self._may_hand_out(next_step, has_unfinished):
                (batch,) = self._held
                self._held = self._waiting_since = None
                return batch
            waited_s = time.monotonic() - self._waiting_since
            position = self._position(next_step, has_unfinished)
            self._agreement.poll(position, waited_s, lambda: self._open_requests(pauses_to_save))
            if (requests := self._agreement.take_interrupt()) is not None:
                return requests
            if self._held is not None and not self._agreement.covers(next_step):
                # Not a sign of life: a rank that waits for others does not get on.
                self._progress.stage = AGREE
                time.sleep(pause_s)
                pause_s = min(pause_s * GROWTH, POLL_S)

    def times_of(self, batch: Batch, plan_s: float, reduce_s: float, rank: int) -> Mapping[str, float]:
        """Return the seconds that each stage took for a batch that `next` has just returned.

        Args:
            batch: the batch.
            plan_s: seconds that this rank planned.
            reduce_s: seconds that it waited for reductions since the last batch.
            rank: this rank; a plan that is missing is waited for in `plan` on rank 0, in `broadcast` on others.
        """
        plan_stage = "plan" if rank == 0 else "broadcast"
        return {
            **batch.times.seconds,
            "wait": self.read_wait_s,
            plan_stage: plan_s + self.plan_wait_s,
            "reduce": reduce_s,
        }

    def finish(self) -> None:
        """Complete what other ranks may wait for. **Collective.**"""
        self._agreement.finish()
        self._feed.finish()

    def _may_hand_out(self, next_step: int, has_unfinished: bool) -> bool:
        """Return True if no other rank waits for the batch that this rank holds."""
        agreement = self._agreement
        return not agreement.has_peers or agreement.covers(next_step) or agreement.is_released(has_unfinished)

    def _hold(self, is_planned: bool, timeout_s: float) -> None:
        """Take the next batch from the feed if it comes within `timeout_s`."""
        began = time.perf_counter()
        # Waits in the feed, so that the reading thread gets the interpreter.
        try:
            self._held = (self._feed.get(timeout_s),)
        except queue.Empty:
            self._held = None
        waited_s = time.perf_counter() - began
        if is_planned:
            self.read_wait_s += waited_s
        else:
            self.plan_wait_s += waited_s

    def _open_requests(self, pauses_to_save: bool) -> OpenRequests:
        """Return the requests that may end the wait."""
        requests = self._flags.poll_waiting()
        return OpenRequests(stop=requests.stop, save=requests.save and pauses_to_save)

    def _position(self, next_step: int, has_unfinished: bool = False) -> RankPosition:
        held_end = min(next_step + int(self._held is not None) + self._feed.num_ready, NO_LIMIT)
        return RankPosition(next_step, held_end, has_unfinished)


def describe_interrupt(requests: OpenRequests, step: int, waited_s: float) -> str:
    """Return what requests that end the wait for the batch of `step` make all ranks do."""
    verb = "stop with" if requests.stop else "save"
    return (
        f"No batch of step {step} has come for {waited_s:.0f} s. As requested, all ranks {verb} the state after step "
        f"{step - 1}."
    )
