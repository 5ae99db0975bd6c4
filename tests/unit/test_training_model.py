"""The reference model: the same everywhere, causal, and honest about its losses."""

import dataclasses
import math

import pytest
import torch

from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.training.model import GPT, build_model
from mixtera_hpc.training.schedule import FINAL_FRACTION, learning_rate

TINY = TrainingConfig(num_layers=2, num_heads=2, embedding_dim=16, num_steps=100, warmup_steps=10, learning_rate=1.0)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def build(**changes: int) -> GPT:
    return build_model(dataclasses.replace(TINY, **changes), vocab_size=50, seq_len=12)


def test_initial_weights_depend_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = build().state_dict()
    torch.manual_seed(2)
    again, other = build().state_dict(), build(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_an_untrained_model_finds_all_tokens_equally_likely() -> None:
    loss = build()(tokens(4, 13))
    assert loss.shape == (4, 12)
    assert loss.mean().item() == pytest.approx(math.log(50), rel=0.02)


def test_a_prediction_sees_no_later_token() -> None:
    model, before = build(), tokens(1, 13)
    after = before.clone()
    after[0, 8] = (after[0, 8] + 1) % 50
    changed = (model(before) - model(after)).abs()[0] > 1e-7
    assert not changed[:7].any()
    assert changed[7:].all()


def test_positions_matter() -> None:
    """Without them, one layer would not notice that two early tokens changed places."""
    model, before = build(num_layers=1), tokens(1, 13)
    before[0, 0], before[0, 1] = 3, 4
    after = before.clone()
    after[0, 0], after[0, 1] = 4, 3
    assert not torch.allclose(model(before)[0, 4:], model(after)[0, 4:], atol=1e-9)


def test_losses_are_those_of_each_sequence_alone() -> None:
    model, batch = build(), tokens(3, 13)
    alone = torch.cat([model(row[None]) for row in batch])
    assert torch.allclose(model(batch), alone, atol=1e-6)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, TINY) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(FINAL_FRACTION)


@pytest.mark.parametrize("warmup_steps", [0, 100, 200])
def test_any_warm_up_gives_a_learning_rate_for_every_step(warmup_steps: int) -> None:
    training = dataclasses.replace(TINY, warmup_steps=warmup_steps)
    assert all(0 < learning_rate(step, training) <= 1 for step in range(100))
