"""The losses that Lightning's hooks hand over before a batch has ended."""

import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.integrations.lightning_batches import LOSS_KEY, HandedOut
from mixtera_hpc.integrations.torch import micro_batches


def test_losses_whose_memory_is_used_again_are_those_of_their_micro_batch(
    collection: list[str],
) -> None:
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.scalars={reward: 8.0}"]
    with DataPlane.open(compose([*collection, *words]), Local()) as plane:
        handed_out = HandedOut(plane, num_micro=2, pin=False)
        batch = next(iter(plane))
        parts = list(micro_batches(batch, 4))
        for part in parts:
            handed_out.hand_out(part)
        losses, rewards = torch.empty(4, 16, requires_grad=True), torch.empty(4)
        for number, _ in enumerate(parts):
            handed_out.begin()
            losses.data.fill_(number + 1)
            rewards.fill_(number)
            if number:
                handed_out.end({LOSS_KEY: losses})
            else:
                handed_out.add(losses, scalars={"reward": rewards})
                handed_out.end({})
        assert handed_out.record()
        plane.state_dict()
        [statistics] = plane.completed_statistics()
        counted = [int(part.loss_mask.sum()) for part in parts]
        assert statistics.loss_sum.sum() == counted[0] + 2 * counted[1]
        assert statistics.scalars["reward"].total.sum() == 0
