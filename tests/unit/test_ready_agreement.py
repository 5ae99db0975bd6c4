"""A batch is handed out when every rank holds it; requests end a wait that takes too long, on all ranks."""

import threading
import time
from collections.abc import Callable

import pytest

from mixtera_hpc.dataplane.steps import ready_agreement
from mixtera_hpc.dataplane.steps.ready_agreement import OpenRequests, RankPosition, ReadyAgreement
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "PERIOD_S": 0.05,
        "INTERRUPT_AFTER_S": 0.2,
        "PATIENCE_S": 0.2,
        "LONG_PATIENCE_S": 1.0,
    }.items():
        monkeypatch.setattr(ready_agreement, name, seconds)


def wait_for(
    agreement: ReadyAgreement,
    step: int,
    held_end: Callable[[], int],
    requests: OpenRequests | None = None,
    has_unfinished: bool = False,
    longest_wait_s: float = 600,
) -> OpenRequests | None:
    """Wait as a rank does that asks for the batch of `step`, and that believes to wait at most `longest_wait_s`."""
    began = time.monotonic()
    while not (agreement.covers(step) or (held_end() > step and agreement.is_released(has_unfinished))):
        position = RankPosition(step, held_end(), has_unfinished)
        waited_s = min(time.monotonic() - began, longest_wait_s)
        agreement.poll(position, waited_s, lambda: requests or OpenRequests())
        if (interrupt := agreement.take_interrupt()) is not None:
            return interrupt
        assert time.monotonic() - began < 600, "the ranks do not agree"
        time.sleep(0.001)
    return None


def test_no_rank_goes_on_before_the_slowest_holds_its_batch() -> None:
    holds = threading.Event()
    early: list[int] = []

    def serve(comm: ThreadCommunicator) -> int:
        agreement = ReadyAgreement(comm, 7)

        def held_end() -> int:
            if comm.rank != 1:
                return 11
            # The slowest rank holds its batches once it has taken part without them.
            if agreement._num_started >= 2:
                holds.set()
            return 7 + 2 * holds.is_set()

        assert wait_for(agreement, 7, held_end) is None
        if not holds.is_set():
            early.append(comm.rank)
        # Rank 1 holds two batches: one reduction is enough for both.
        assert agreement.covers(8) and not agreement.covers(9)
        agreement.finish()
        return agreement._num_started

    counts = run_ranks(3, serve)
    assert not early
    assert len(set(counts)) == 1 and counts[0] > 1


@pytest.mark.parametrize("requests", [OpenRequests(stop=True), OpenRequests(save=True)])
def test_a_request_of_one_rank_ends_the_wait_of_all(requests: OpenRequests) -> None:
    def serve(comm: ThreadCommunicator) -> tuple[OpenRequests | None, float]:
        # Before a collective: no rank begins to wait earlier than this.
        began = time.monotonic()
        agreement = ReadyAgreement(comm, 0)
        # Rank 2 hangs in its read.
        interrupt = wait_for(agreement, 0, lambda: 0 if comm.rank == 2 else 4, requests if comm.rank == 1 else None)
        waited_s = time.monotonic() - began
        # A save does not end the run: the same batch is asked for again, and comes.
        assert wait_for(agreement, 0, lambda: 4) is None
        agreement.finish()
        return interrupt, waited_s

    for interrupt, waited_s in run_ranks(3, serve):
        assert interrupt == requests and waited_s >= 0.2


def test_a_request_does_not_end_a_short_wait() -> None:
    def serve(comm: ThreadCommunicator) -> OpenRequests | None:
        agreement = ReadyAgreement(comm, 0)
        num_asked = 0

        def held_end() -> int:
            nonlocal num_asked
            num_asked += 1
            return int(num_asked > 100 * comm.rank)

        # The limit is INTERRUPT_AFTER_S, however long the threads really take.
        interrupt = wait_for(agreement, 0, held_end, OpenRequests(stop=True), longest_wait_s=0.19)
        agreement.finish()
        return interrupt

    assert run_ranks(2, serve) == [None, None]


def test_a_rank_that_is_ahead_of_the_others_does_not_wait_for_them() -> None:
    """Rank 0 holds batches, and rank 1 cannot ask for its next one before rank 0 goes on."""
    num_steps = 300
    goes_on = [threading.Event() for _ in range(num_steps)]

    def serve(comm: ThreadCommunicator) -> int:
        agreement = ReadyAgreement(comm, 0)
        for step in range(num_steps):
            if comm.rank == 1:
                assert goes_on[step].wait(600)
            wait_for(agreement, step, lambda end=step + 1: end, has_unfinished=comm.rank == 0)
            goes_on[step].set()
        agreement.finish()
        return agreement._num_started

    began = time.monotonic()
    counts = run_ranks(2, serve)
    assert counts[0] == counts[1]
    # It waits only MAX_RELEASES times in vain: some 0.6 s. A wait at every step would take a minute.
    assert time.monotonic() - began < num_steps * ready_agreement.PATIENCE_S / 2


def test_one_reduction_serves_several_steps() -> None:
    """Four batches are held ahead. The reduction for the next ones starts during the last step of a range."""

    def serve(comm: ThreadCommunicator) -> int:
        agreement = ReadyAgreement(comm, 0)
        for step in range(40):
            wait_for(agreement, step, lambda held_end=step + 4: held_end)
            if agreement.needs_offer(step + 1):
                agreement.offer(RankPosition(step + 1, step + 4))
            comm.Barrier()
        started = agreement._num_started
        agreement.finish()
        return started

    assert max(run_ranks(3, serve)) <= 40 / 2 + 1
