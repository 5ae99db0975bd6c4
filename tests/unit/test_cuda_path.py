"""The code that runs only with a GPU, on a simulated one: nothing waits for the device, and nothing races with it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.steps.step_losses import StepLosses
from mixtera_hpc.dataplane.steps.step_scalars import StepScalars
from mixtera_hpc.integrations.device_staging import MAX_BUFFERS, DeviceStage
from tests.unit.simulated_cuda import CudaTensor, HostWaits, Race, SimulatedCuda, Stream, simulated_cuda

B, T, K = 8, 17, 4


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as device:
        yield device


def batch_of(seed: int, num_rows: int = B) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        step=seed,
        domain_ids=rng.integers(0, K, num_rows),
        positions=np.arange(num_rows),
        tokens=rng.integers(0, 99, (num_rows, T + 1)),
        loss_mask=rng.random((num_rows, T)) < 0.7,
        document_ids=np.zeros((num_rows, T + 1), np.int32),
    )


def losses_of(seed: int, dtype: Any = torch.float32) -> Any:
    losses = torch.from_numpy(np.random.default_rng(seed).normal(3, 2, (B, T))).to(dtype)
    losses[1, 2] = float("nan")
    return losses


def expected(batch: Batch, losses: Any) -> Any:
    on_host = StepLosses(batch, K)
    on_host.add(losses, slice(None), None, None)
    return on_host.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recording_micro_batches_never_waits_for_the_device(cuda: SimulatedCuda, dtype: Any) -> None:
    batch, losses = batch_of(0), losses_of(0, dtype)
    recorded = StepLosses(batch, K)
    for rows in (slice(0, 3), np.array([7, 3, 5]), slice(4, 5), slice(6, 7)):
        recorded.add(cuda.tensor(losses[rows]), rows, None, None)
    assert not recorded.are_on_host  # The copy is on its way.
    assert (recorded.total() == expected(batch, losses)).all()
    assert recorded.are_on_host


def test_parts_of_sequences_and_sums_are_compared_on_the_device(cuda: SimulatedCuda) -> None:
    batch, losses = batch_of(1), losses_of(1)
    parts = StepLosses(batch, K)
    for tokens in (slice(0, 9), slice(9, T)):
        parts.add(cuda.tensor(losses[:, tokens]), slice(None), tokens, None)
    assert (parts.total() == expected(batch, losses)).all()

    sums = StepLosses(batch, K)
    counted = torch.from_numpy(batch.loss_mask.sum(axis=1))
    sums.add(cuda.tensor(torch.ones(B)), slice(None), None, cuda.tensor(counted + 1))
    with pytest.raises(ValueError, match="num_tokens of 8 sequences"):
        sums.total()


def test_the_tokens_of_samples_are_counted_on_the_device(cuda: SimulatedCuda) -> None:
    domain_ids = np.append(np.arange(B - 1) % K, -1)
    samples = replace(batch_of(5), domain_ids=domain_ids, payloads=[{}] * B)
    counts, losses = torch.arange(B) - 1, torch.arange(B) * 1.5
    counts[0] = 0
    recorded, on_host = StepLosses(samples, K), StepLosses(samples, K)
    for rows in (slice(0, 5), slice(5, B)):
        recorded.add(cuda.tensor(losses[rows]), rows, None, cuda.tensor(counts[rows]))
        on_host.add(losses[rows], rows, None, counts[rows])
    assert (recorded.total() == on_host.total()).all()
    assert (recorded.means() == on_host.means())[2:-1].all()
    assert recorded.sequence_sums()[1].tolist() == [0, *range(B - 2), 0]

    wrong = StepLosses(samples, K)
    wrong.add(cuda.tensor(losses), slice(None), None, cuda.tensor(counts - 2))
    with pytest.raises(ValueError, match=r"num_tokens of 3 sequences .* or are below 0"):
        wrong.total()


def test_losses_of_several_streams_are_added_in_order(cuda: SimulatedCuda) -> None:
    batch, losses = batch_of(2), losses_of(2)
    recorded = StepLosses(batch, K, num_parts=2)
    for rows in (slice(0, 4), slice(4, 8)):
        with torch.cuda.stream(torch.cuda.Stream()):
            recorded.add(cuda.tensor(losses[rows]), rows, None, None)
    assert (recorded.total() == expected(batch, losses)).all()


def test_a_stream_may_use_the_memory_of_losses_again_that_it_recorded(cuda: SimulatedCuda) -> None:
    batch, losses = batch_of(4), losses_of(4)
    counts = torch.from_numpy(batch.loss_mask.sum(axis=1))
    recorded, sums = StepLosses(batch, K), StepLosses(batch, K)
    halves = [(slice(0, 4), torch.cuda.current_stream()), (slice(4, 8), torch.cuda.Stream())]
    for rows, stream in halves:
        with torch.cuda.stream(stream):
            buffers = [cuda.tensor(losses[rows]), cuda.tensor(torch.ones(4)), cuda.tensor(counts[rows])]
            recorded.add(buffers[0], rows, None, None)
            sums.add(buffers[1], rows, None, buffers[2])
            for buffer in buffers:
                buffer.zero_()  # As the next replay of a CUDA graph may do.
    assert (recorded.total() == expected(batch, losses)).all()
    assert sums.total()[0].any()


def test_scalars_are_those_of_their_step_although_the_trainer_uses_their_memory_again(
    cuda: SimulatedCuda,
) -> None:
    domain_ids = np.arange(B) % K
    steps = []
    buffer, on_host = cuda.tensor(torch.zeros(B)), torch.zeros(B, dtype=torch.float64)
    for step in range(3):
        values = torch.arange(B, dtype=torch.float64) * (step + 1)
        buffer.copy_(cuda.tensor(values))
        on_host.copy_(values)
        steps.append(StepScalars({"norm": 100.0, "reward": 100.0}, domain_ids))
        steps[-1].add(steps[-1].copies_of({"norm": buffer, "reward": on_host}, slice(None), step), slice(None))
        assert not steps[-1].are_on_host
    for step, recorded in enumerate(steps):
        rows = recorded.rows(K).reshape(2, 3, K)
        assert np.allclose(rows[:, 0] / 2**32 * 100, np.array([4, 6, 8, 10]) * (step + 1))


def test_transfers_overlap_and_pinned_memory_is_used_again_only_behind_them(cuda: SimulatedCuda) -> None:
    stage = DeviceStage(torch.device("cuda"))
    for step in range(3 * MAX_BUFFERS):
        # Larger batches come with a ramp, smaller ones at the end of the data.
        batch = batch_of(step, num_rows=B + 3 * (step % 3))
        batch.tokens.flags.writeable = False
        arrays = [batch.tokens, batch.loss_mask, batch.document_ids, np.ones(B, np.float32)]
        staged = stage.copy(*arrays)
        for array, tensor in zip(arrays, staged, strict=True):
            trained = tensor + 0  # The trainer's stream reads it.
            assert isinstance(trained, CudaTensor)
            assert (trained.content.numpy() == array).all()
            assert trained.dtype == torch.from_numpy(np.zeros(1, array.dtype)).dtype or array.dtype == np.bool_


@pytest.mark.parametrize("are_losses_on_host", [False, True])
def test_a_loop_that_is_a_step_ahead_of_the_device_never_waits_for_it(
    cuda: SimulatedCuda,
    collection: list[str],
    are_losses_on_host: bool,
) -> None:
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.scalars={norm: 8.0}"]
    with DataPlane.open(compose([*collection, *words]), Local()) as plane:
        batches = iter(plane)
        for _ in range(6):
            batch = next(batches)
            cuda.finish()  # The step before.
            losses = cuda.tensor(torch.ones(8, 16))
            scalars = {"norm": losses.sum(dim=1) / 16}
            plane.record(batch, np.ones((8, 16)) if are_losses_on_host else losses, scalars=scalars)
            assert not cuda.streams[0].is_done
        assert cuda.num_waits == 0
        plane.state_dict()
        statistics = plane.completed_statistics()
        assert [s.scalars["norm"].total.sum() for s in statistics] == [8] * 6
        assert cuda.num_waits > 0  # The state holds the last step, too.


class MpsTensor(torch.Tensor):
    """A tensor on an accelerator without float64, whose copies to the host nobody can wait for."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("double", "numpy", "to", "copy_"):
            raise TypeError(f"{func.__name__} on mps")
        if func.__name__ == "cpu":
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_losses_on_another_accelerator_are_summed_on_the_host() -> None:
    batch, losses = batch_of(3), losses_of(3)
    recorded = StepLosses(batch, K)
    recorded.add(losses.as_subclass(MpsTensor), slice(None), None, None)
    assert (recorded.total() == expected(batch, losses)).all()

    counted = torch.from_numpy(batch.loss_mask.sum(axis=1))
    sums = StepLosses(batch, K)
    sums.add(torch.ones(B).as_subclass(MpsTensor), slice(None), None, counted.as_subclass(MpsTensor))
    assert sums.are_on_host

    scalars = StepScalars({"norm": 10.0}, batch.domain_ids)
    copies = scalars.copies_of({"norm": torch.ones(B).as_subclass(MpsTensor)}, slice(None), 0)
    scalars.add(copies, slice(None))
    assert scalars.rows(K)[1].sum() == B


def test_sums_on_the_host_are_compared_with_counts_on_the_device(cuda: SimulatedCuda) -> None:
    counted = cuda.tensor(torch.zeros(B, dtype=torch.int64))
    with pytest.raises(HostWaits):
        StepLosses(batch_of(0), K).add(torch.ones(B), slice(None), None, counted)


def test_the_simulation_finds_what_waits_and_what_races(cuda: SimulatedCuda) -> None:
    tensor = cuda.tensor(torch.arange(4))
    for wait in (
        lambda: tensor.sum().item(),
        lambda: bool(tensor[0] > 0),
        lambda: tensor[tensor > 1],
        lambda: tensor.nonzero(),
        lambda: tensor.cpu(),
        lambda: tensor.tolist(),
        lambda: torch.zeros(4).to("cuda", non_blocking=True),
        lambda: torch.zeros(4).pin_memory().to("cuda"),
        lambda: torch.equal(tensor, tensor),
    ):
        with pytest.raises(HostWaits):
            wait()
    with torch.cuda.stream(Stream()), pytest.raises(Race):
        tensor + 1
    other = Stream()
    other.wait_stream(cuda.current)
    with torch.cuda.stream(other):
        tensor + 1
    with pytest.raises(Race):
        tensor.zero_()
    tensor.record_stream(other)
