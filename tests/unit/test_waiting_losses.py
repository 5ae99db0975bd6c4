"""Losses that are on their way from an accelerator: their reduction starts later, and nothing waits for them before."""

import numpy as np

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.steps.reduction.step_reducer import RankFlags, StepReducer
from mixtera_hpc.dataplane.steps.step_losses import StepLosses

FLAGS = RankFlags(stop=False, save=False, digest=1)


class LateLosses(StepLosses):
    """Losses on a device that has not computed them yet."""

    has_arrived = False

    @property
    def are_on_host(self) -> bool:
        return self.has_arrived


def losses_of(step: int) -> LateLosses:
    batch = Batch(
        step=step,
        domain_ids=np.array([0, 1]),
        positions=np.arange(2),
        tokens=np.zeros((2, 5), np.int64),
        loss_mask=np.ones((2, 4), np.bool_),
        document_ids=np.zeros((2, 5), np.int32),
    )
    losses = LateLosses(batch, 2)
    losses.add(np.full((2, 4), step + 1.0), slice(None), None, None)
    return losses


def test_reductions_start_in_order_when_losses_have_arrived() -> None:
    reducer = StepReducer(Local(), 2, lambda step: 2, BatchSlice())
    steps = [losses_of(step) for step in range(4)]
    for step, losses in enumerate(steps):
        reducer.post_losses(step, losses, FLAGS, is_counted=True)
    steps[1].has_arrived = True
    assert reducer.poll() == []  # Step 0 is still on its way.
    steps[0].has_arrived = True
    assert [result.statistics.step for result in reducer.poll()] == [0, 1]
    [waited] = reducer.wait_for(2)
    assert (waited.statistics.step, waited.statistics.loss_sum.tolist()) == (2, [12.0, 12.0])
    assert [result.statistics.step for result in reducer.drain()] == [3]


def test_a_step_whose_losses_do_not_count_waits_for_nothing() -> None:
    reducer = StepReducer(Local(), 2, lambda step: 2, BatchSlice())
    reducer.post_losses(0, losses_of(0), FLAGS, is_counted=False)
    assert [result.statistics.num_tokens.sum() for result in reducer.poll()] == [0]
