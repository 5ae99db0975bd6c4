"""Losses that are summed where they are: the same integers as on the host, whatever is recorded and in which order."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.steps.step_losses import StepLosses

torch = pytest.importorskip("torch")
from mixtera_hpc.dataplane.steps.device_sums import DeviceSums  # noqa: E402 - needs torch

B, T, K = 7, 33, 5


def batch_of(rng: np.random.Generator) -> Batch:
    domain_ids = np.array([3, 0, 3, 4, 0, 0, -1])
    mask = rng.random((B, T)) < 0.7
    mask[6] = False
    mask[4] = False
    return Batch(
        step=0,
        domain_ids=domain_ids,
        positions=np.arange(B),
        tokens=np.zeros((B, T + 1), np.int64),
        loss_mask=mask,
        document_ids=np.zeros((B, T + 1), np.int32),
    )


def losses_of(rng: np.random.Generator, dtype: Any) -> Any:
    losses = torch.from_numpy(rng.normal(3, 2, (B, T)) * np.exp(rng.normal(0, 3, (B, T)))).to(dtype)
    losses[1, 3] = float("nan")
    losses[2, 5] = float("inf")
    losses[3, 0] = 2.0**25
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_sums_on_the_device_have_the_bits_of_the_host(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    batch = batch_of(rng)
    losses = losses_of(rng, dtype)
    on_host = StepLosses(batch, K)
    on_host.add(losses, slice(None), None, None)

    sums = DeviceSums("cpu", batch.domain_ids)
    with torch.inference_mode():
        for rows in (np.array([5, 0, 2]), slice(3, 5), np.array([6, 1])):
            mask = batch.loss_mask[rows]
            sums.add(rows, losses[rows], mask, mask.sum(axis=1))
    assert (sums.domain_sums(K) == on_host.total()).all()
    expected, _ = on_host.sequence_sums()
    finite = expected.is_finite
    of_sequences, num_tokens = sums.sequence_sums()
    assert (of_sequences.is_finite == finite).all()
    assert (of_sequences.quanta[finite] == expected.quanta[finite]).all()
    assert num_tokens.tolist() == batch.loss_mask.sum(axis=1).tolist()


def test_sums_of_the_trainer_are_compared_with_the_mask_when_they_arrive() -> None:
    batch = batch_of(np.random.default_rng(0))
    counted = batch.loss_mask.sum(axis=1)
    for extra in (0, 1):
        sums = DeviceSums("cpu", batch.domain_ids)
        claimed = torch.from_numpy(counted + extra)
        sums.add(slice(None), torch.ones(B, 1), np.ones((B, 1), np.bool_), counted, claimed)
        if extra:
            with pytest.raises(ValueError, match="num_tokens of 7 sequences"):
                sums.domain_sums(K)
        else:
            assert sums.domain_sums(K)[1].tolist() == [
                counted[[1, 4, 5]].sum(),
                0,
                0,
                counted[[0, 2]].sum(),
                counted[3],
            ]


def test_a_tensor_that_requires_gradients_can_be_recorded() -> None:
    sums = DeviceSums("cpu", np.array([0]))
    losses = torch.ones(1, 4, requires_grad=True) * 2
    sums.add(slice(None), losses, np.ones((1, 4), np.bool_), np.array([4]))
    assert sums.sequence_sums()[0].nats.tolist() == [8.0]
