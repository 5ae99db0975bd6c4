"""Gradients are the mean over the counted tokens, for any division into micro-batches."""

import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.process_group import Replicas
from mixtera_hpc.training.distributed import GradientBuffer
from mixtera_hpc.training.model import GPT, build_model

TINY = TrainingConfig(num_layers=1, num_heads=2, embedding_dim=16)


def build() -> GPT:
    return build_model(TINY, vocab_size=50, seq_len=12)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return six sequences with different numbers of counted tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (6, 13), generator=generator)
    return tokens, torch.arange(12) < torch.tensor([12, 1, 5, 0, 7, 3])[:, None]


def expected() -> list[torch.Tensor]:
    model = build()
    tokens, mask = batch()
    (model(tokens)[mask].sum() / mask.sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_micro_batches_of_unequal_size_give_the_mean_over_all_counted_tokens() -> None:
    model = build()
    tokens, mask = batch()
    gradients = GradientBuffer(model)
    gradients.zero()
    for rows, counted in zip(tokens.split([1, 3, 2]), mask.split([1, 3, 2]), strict=True):
        gradients.backward(model(rows), counted)
    gradients.average(Replicas(Local(), "cpu"))
    for actual, wanted in zip([p.grad for p in model.parameters()], expected(), strict=True):
        assert actual is not None
        assert torch.allclose(actual, wanted, atol=1e-7)


def test_a_step_does_not_depend_on_the_gradients_of_the_previous_step() -> None:
    model = build()
    tokens, mask = batch()
    gradients = GradientBuffer(model)
    replicas = Replicas(Local(), "cpu")
    for _ in range(2):
        gradients.zero()
        gradients.backward(model(tokens), mask)
        gradients.average(replicas)
    for actual, wanted in zip([p.grad for p in model.parameters()], expected(), strict=True):
        assert actual is not None
        assert torch.allclose(actual, wanted, atol=1e-7)


def test_a_step_without_counted_tokens_has_zero_gradients() -> None:
    model = build()
    gradients = GradientBuffer(model)
    gradients.average(Replicas(Local(), "cpu"))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 0.2), (10.0, 1.0)])
def test_clipping_scales_only_gradients_above_the_maximum_norm(max_norm: float, scale: float) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    gradients = GradientBuffer(model)
    model.weight.grad.copy_(torch.tensor([[3.0, 4.0]]))
    gradients.clip(max_norm)
    assert torch.allclose(model.weight.grad, torch.tensor([[3.0, 4.0]]) * scale, atol=1e-5)


def test_requesting_a_missing_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"training\.device is cuda"):
        Replicas(Local(), "cuda")
