"""The reference model and its learning rate: reproducible weights, causal predictions, losses per token."""

import dataclasses
import itertools
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


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = build().state_dict()
    torch.manual_seed(2)
    again = build().state_dict()
    other = build(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_an_untrained_model_predicts_all_tokens_with_equal_probability() -> None:
    loss = build()(tokens(4, 13))
    assert loss.shape == (4, 12)
    assert loss.mean().item() == pytest.approx(math.log(50), rel=0.02)


def test_a_prediction_does_not_depend_on_later_tokens() -> None:
    model = build()
    before = tokens(1, 13)
    after = before.clone()
    after[0, 8] = (after[0, 8] + 1) % 50
    changed = (model(before) - model(after)).abs()[0] > 1e-7
    assert not changed[:7].any()
    assert changed[7:].all()


def test_predictions_depend_on_token_positions() -> None:
    """Without positions, one layer would give the same predictions after two early tokens are swapped."""
    model = build(num_layers=1)
    before = tokens(1, 13)
    before[0, :2] = torch.tensor([3, 4])
    after = before.clone()
    after[0, :2] = torch.tensor([4, 3])
    assert not torch.allclose(model(before)[0, 4:], model(after)[0, 4:], atol=1e-9)


def test_the_loss_of_a_sequence_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = build()
    batch = tokens(3, 13)
    alone = torch.cat([model(row[None]) for row in batch])
    assert torch.allclose(model(batch), alone, atol=1e-6)


def test_with_attention_inside_documents_a_packed_sequence_has_the_losses_of_its_documents_alone() -> None:
    model = build()
    packed = tokens(2, 13)
    starts = [[0, 4, 9], [0, 1, 13]]
    document_ids = torch.stack([torch.searchsorted(torch.tensor(s), torch.arange(13), right=True) - 1 for s in starts])
    position_ids = torch.arange(13) - torch.tensor(starts).gather(1, document_ids)
    loss = model(packed, (document_ids.int(), position_ids.int()))

    for row, of_row in enumerate(starts):
        for start, stop in itertools.pairwise([*(s for s in of_row if s < 13), 13]):
            # The first token of a document is predicted from the document before it.
            alone = model(packed[row : row + 1, start:stop])[0]
            assert torch.allclose(loss[row, start : stop - 1], alone, atol=1e-6)
    assert not torch.allclose(model(packed)[0, 9:], loss[0, 9:], atol=1e-6)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, TINY) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(FINAL_FRACTION)


@pytest.mark.parametrize("warmup_steps", [0, 100, 200])
def test_the_learning_rate_is_positive_for_any_warm_up(warmup_steps: int) -> None:
    training = dataclasses.replace(TINY, warmup_steps=warmup_steps)
    assert all(0 < learning_rate(step, training) <= 1 for step in range(100))
