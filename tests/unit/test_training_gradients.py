"""Gradients are the mean over counted tokens, however the work is cut."""

import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.training.distributed import GradientBuffer, Replicas
from mixtera_hpc.training.model import GPT, build_model

TINY = TrainingConfig(num_layers=1, num_heads=2, embedding_dim=16)


def build() -> GPT:
    return build_model(TINY, vocab_size=50, seq_len=12)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Six sequences of which each counts another number of tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (6, 13), generator=generator)
    return tokens, torch.arange(12) < torch.tensor([12, 1, 5, 0, 7, 3])[:, None]


def expected() -> list[torch.Tensor]:
    model, (tokens, mask) = build(), batch()
    (model(tokens)[mask].sum() / mask.sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradients_of_unequal_pieces_are_the_mean_over_all_counted_tokens() -> None:
    model, (tokens, mask) = build(), batch()
    gradients = GradientBuffer(model)
    gradients.zero()
    for rows, counted in zip(tokens.split([1, 3, 2]), mask.split([1, 3, 2]), strict=True):
        gradients.backward(model(rows), counted)
    gradients.average(Replicas(Local(), "cpu"))
    for got, want in zip([p.grad for p in model.parameters()], expected(), strict=True):
        assert got is not None
        assert torch.allclose(got, want, atol=1e-7)


def test_a_new_step_forgets_the_last_one() -> None:
    model, (tokens, mask) = build(), batch()
    gradients, replicas = GradientBuffer(model), Replicas(Local(), "cpu")
    for _ in range(2):
        gradients.zero()
        gradients.backward(model(tokens), mask)
        gradients.average(replicas)
    for got, want in zip([p.grad for p in model.parameters()], expected(), strict=True):
        assert got is not None
        assert torch.allclose(got, want, atol=1e-7)


def test_a_step_that_counts_no_token_has_no_gradient() -> None:
    model = build()
    gradients = GradientBuffer(model)
    gradients.average(Replicas(Local(), "cpu"))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 0.2), (10.0, 1.0)])
def test_clipping_shortens_long_gradients_and_leaves_short_ones(max_norm: float, scale: float) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    gradients = GradientBuffer(model)
    model.weight.grad.copy_(torch.tensor([[3.0, 4.0]]))
    gradients.clip(max_norm)
    assert torch.allclose(model.weight.grad, torch.tensor([[3.0, 4.0]]) * scale, atol=1e-5)


def test_asking_for_a_gpu_that_is_not_there_is_the_users_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"training\.device is cuda"):
        Replicas(Local(), "cuda")
