"""The quota of held-out sequences: every domain has a loss, and the mean loss stays that of natural proportions."""

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.measures.held_out_counts import held_out_counts
from mixtera_hpc.dataplane.plane import DataPlane


@pytest.mark.parametrize("quota", [1, 3])
def test_every_one_of_a_thousand_domains_gets_its_quota(quota: int) -> None:
    random = np.random.Generator(np.random.Philox(0))
    capacity = (random.pareto(1.0, 1000) * 50 + 1).astype(np.int64)
    capacity[3] = 0
    shares = capacity / capacity.sum()
    counts = held_out_counts(shares, capacity, batch_size=32, num_batches=8, quota=quota)
    assert counts is not None
    assert (counts >= np.minimum(capacity, quota)).all()
    assert (counts <= capacity).all()
    assert counts.sum() % 32 == 0
    assert counts.sum() - np.minimum(capacity, quota).sum() < 32


def test_natural_proportions_stay_where_they_fill_the_quota() -> None:
    capacity = np.array([900, 90, 10])
    assert held_out_counts(capacity / 1000, capacity, batch_size=10, num_batches=20, quota=1) is None
    counts = held_out_counts(capacity / 1000, capacity, batch_size=10, num_batches=2, quota=1)
    assert counts is not None
    assert counts.tolist() == [17, 2, 1]


def test_too_few_sequences_for_another_batch_leave_some_domains_out() -> None:
    counts = held_out_counts(np.full(3, 1 / 3), np.ones(3, np.int64), batch_size=2, num_batches=1, quota=1)
    assert counts is not None
    assert counts.sum() == 2


def test_a_validation_serves_the_quota_and_reports_the_natural_mean(collection: list[str]) -> None:
    words = ["query.holdout.fraction=0.3", "training.validate_steps=1", "training.validate_min_sequences=2"]
    plain = [word for word in collection if not word.startswith("mixture.")]
    shape = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "mixture.group_by=[source]"]
    config = compose([*plain, *shape, *words])
    with DataPlane.open(config, Local()) as plane:
        held_out = plane.held_out()
        for batch in held_out.batches():
            losses = np.where(batch.domain_ids == 0, 5.0, 1.0)
            held_out.record(batch, np.broadcast_to(losses[:, None], batch.loss_mask.shape))
        statistics = held_out.reduce(0)
        has_held_out = held_out.plan.shares > 0
        assert has_held_out.sum() > 4, "more domains than a batch has pairs of sequences"
        assert statistics.num_sequences[has_held_out].min() >= 1
        assert np.median(statistics.num_sequences[has_held_out]) >= 2
        assert held_out.num_batches == statistics.num_sequences.sum() // 8 > 1
        share = held_out.plan.shares[0]
        assert held_out.mean_loss(statistics) == pytest.approx(5 * share + 1 - share)
        assert held_out.mean_loss(statistics) != pytest.approx(
            statistics.loss_sum.sum() / statistics.num_tokens.sum(), abs=1e-3
        )
