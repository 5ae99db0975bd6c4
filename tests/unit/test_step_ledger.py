"""The bookkeeping of training steps against data steps, at the points where its arithmetic decides."""

import pytest

from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger


def ledger(skips: tuple[tuple[int, int], ...] = (), next_step: int = 0, current_chunk: int = -1) -> StepLedger:
    """Return a ledger of chunks of 4 steps."""
    version = StreamVersion.start(2).with_skips(skips)
    return StepLedger(version, 4, next_step=next_step, current_chunk=current_chunk, num_fed=next_step)


def test_the_newest_common_step_is_the_one_before_the_current_step() -> None:
    steps = ledger()
    steps.serve(6, chunk=1)
    assert (steps.last_common_step, steps.current_step, steps.next_step) == (5, 6, 7)


@pytest.mark.parametrize(
    ("next_step", "current_chunk", "last_chunk"),
    [(0, -1, 0), (1, 0, 1), (4, 0, 1), (5, 1, 2)],
    ids=["before the first chunk", "inside chunk 0", "after chunk 0", "inside chunk 1"],
)
def test_one_chunk_is_planned_ahead_of_the_current_one(next_step: int, current_chunk: int, last_chunk: int) -> None:
    assert ledger(next_step=next_step, current_chunk=current_chunk).last_chunk_to_plan == last_chunk


def test_plans_reach_the_next_step_across_skipped_chunks() -> None:
    steps = ledger(((4, 15),), next_step=4, current_chunk=0)
    assert steps.next_data_step == 16
    assert steps.last_chunk_to_plan == 4


def test_every_data_step_is_fed_once_and_in_order() -> None:
    steps = ledger(((2, 3),))
    fed = []
    for step in range(4):
        fed += steps.feed_skipped(steps.data_step(step))
        fed.append(steps.feed(step))
    assert fed == [0, 1, 2, 3, 4, 5]
    assert steps.num_fed == 6


def test_data_steps_that_are_skipped_next_are_not_waited_for() -> None:
    steps = ledger(((2, 3),))
    for step in range(2):
        steps.feed(step)
    assert steps.first_unknown_data_step == 4
    assert list(steps.feed_skipped(4)) == [2, 3]
