"""The user's scalars: exact sums per domain for any layout of ranks; out of range is counted, never wrapped."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.measures.scalars import accumulate_scalar, scalars_from_rows
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import CommError, ConfigError
from mixtera_hpc.integrations.transformers_arguments import check_trainer_arguments
from mixtera_hpc.testing.thread_ranks import run_ranks

WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "dataplane.scalars={grad_norm: 10.0, reward: 1.0}",
]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    plain = [word for word in collection if not word.startswith("mixture.")]
    return compose([*plain, *WORDS, "mixture.group_by=[source]"])


def serve(config: Config, comm: Communicator, is_half: bool = False) -> Any:
    """Record four steps in one or two micro-batches; return the sums of every step."""
    sums = []
    with DataPlane.open(config, comm) as plane:
        batches = iter(plane)
        for _ in range(4):
            batch = next(batches)
            norms = 0.1 + 0.7 * batch.positions + batch.step
            half = len(batch.positions) // 2
            for rows in (slice(0, half), slice(half, None)) if is_half else (slice(None),):
                losses = np.ones((len(batch.positions[rows]), 16))
                plane.record(batch, losses, rows=rows, scalars={"grad_norm": norms[rows]})
        plane.state_dict()
        for statistics in plane.completed_statistics():
            scalar = statistics.scalars["grad_norm"]
            sums.append([scalar.total.tolist(), scalar.count.tolist(), scalar.num_out_of_range.tolist()])
            assert statistics.scalars["reward"].count.sum() == 0
            assert (scalar.count == statistics.num_sequences).all()
    return sums


def test_sums_are_the_same_for_every_number_of_ranks(config: Config) -> None:
    alone = serve(config, Local())
    assert len(alone) == 4
    # Positions 0 to 7 in every step.
    assert sum(alone[0][0]) == pytest.approx(8 * 0.1 + 0.7 * 28, abs=1e-7)
    assert serve(config, Local(), is_half=True) == alone
    assert run_ranks(4, lambda comm: serve(config, comm)) == [alone] * 4


def serve_peers(config: Config, comm: Communicator, recorders: set[int]) -> Any:
    """Record losses on every rank, and scalars on `recorders`; return the sums and counts of step 0."""
    with DataPlane.open(config, comm) as plane:
        batch = next(iter(plane))
        losses = np.ones((len(batch.positions), 16))
        scalars = {"grad_norm": 0.1 + 0.7 * batch.positions} if comm.rank in recorders else None
        plane.record(batch, losses, scalars=scalars)
        plane.state_dict()
        (statistics,) = plane.completed_statistics()
        scalar = statistics.scalars["grad_norm"]
        return scalar.total.tolist(), scalar.count.tolist()


def test_scalars_of_one_of_two_model_parallel_peers_are_refused(config: Config) -> None:
    """Copies of losses count once, which would halve scalars that have no copy."""
    pairs = replace(config, dataplane=replace(config.dataplane, model_parallel_size=2))
    alone = serve_peers(config, Local(), {0})
    assert sum(alone[1]) == 8
    assert run_ranks(4, lambda comm: serve_peers(pairs, comm, {0, 1, 2, 3})) == [alone] * 4
    assert run_ranks(4, lambda comm: serve_peers(pairs, comm, set()))[0][1] == [0] * len(alone[1])
    for recorders, values in (({0, 2}, r"\[4, 0\]"), ({0, 1, 3}, r"\[0, 4\]"), ({1}, r"\[0, 4\]")):
        with pytest.raises(CommError, match=f"recorded the same losses of step 0, but {values} values of scalars"):
            run_ranks(4, lambda comm, own=recorders: serve_peers(pairs, comm, own))


def test_values_out_of_range_are_counted_and_left_out() -> None:
    values = np.array([0.5, -2.0, 2.0000001, np.nan, np.inf, 1.0])
    rows = accumulate_scalar(np.array([0, 0, 0, 1, 1, 1]), values, 2.0, 3)
    scalar = scalars_from_rows(rows, {"x": 2.0})["x"]
    assert scalar.total.tolist() == [-1.5, 1.0, 0.0]
    assert scalar.count.tolist() == [2, 1, 0]
    assert scalar.num_out_of_range.tolist() == [1, 2, 0]
    assert np.isnan(scalar.mean).tolist() == [False, False, True]


def test_wrong_scalars_are_refused(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        batch = next(iter(plane))
        losses = np.ones((8, 16))
        with pytest.raises(ValueError, match=r"scalar 'grad_norms', which is not declared\. Did you mean 'grad_norm'"):
            plane.record(batch, losses, scalars={"grad_norms": np.ones(8)})
        with pytest.raises(ValueError, match=r"'grad_norm' of shape \(7,\), expected a number per sequence: \(8,\)"):
            plane.record(batch, losses, scalars={"grad_norm": np.ones(7)})
        plane.record(batch, losses[:4], rows=slice(0, 4), scalars={"grad_norm": np.ones(4)})
        with pytest.raises(CommError, match="'grad_norm' of step 0 was recorded 2 times"):
            plane.record(batch, losses[:4], rows=slice(0, 4), scalars={"grad_norm": np.ones(4)})
        plane.record(batch, losses[4:], rows=slice(4, 8))


@pytest.mark.parametrize(
    ("losses", "scalars"),
    [
        (np.ones((8, 15)), {"grad_norm": np.full(8, 3.0)}),
        (np.full((8, 16), "high"), {"grad_norm": np.full(8, 3.0)}),
        (np.ones((8, 16)), {"grad_norm": np.full(8, 3.0), "reward": np.ones(7)}),
        (np.ones((8, 16)), {"grad_norm": np.full(8, 3.0), "reward": [1.0]}),
        (np.ones((8, 16)), {"grad_norm": np.full(8, 3.0), "reward": np.full(8, "high")}),
    ],
)
def test_a_call_that_is_refused_records_nothing(config: Config, losses: Any, scalars: dict[str, Any]) -> None:
    with DataPlane.open(config, Local()) as plane:
        batch = next(iter(plane))
        with pytest.raises((ValueError, TypeError)):
            plane.record(batch, losses, scalars=scalars)
        plane.record(batch, np.ones((8, 16)), scalars={"grad_norm": np.full(8, 2.0)})
        plane.state_dict()
        (statistics,) = plane.completed_statistics()
        assert statistics.scalars["grad_norm"].total.sum() == pytest.approx(8 * 2.0)
        assert statistics.num_tokens.sum() == 8 * 16


def test_a_scale_must_be_above_0(collection: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"dataplane\.scalars\.x is 0; expected"):
        compose([*collection, "dataplane.scalars={x: 0}"])


def test_loss_weights_are_in_the_batch_and_not_in_the_statistics(collection: list[str]) -> None:
    plain = [word for word in collection if not word.startswith("mixture.")]
    domains = "[{key: {source: 'a*'}, weight: 0.5, loss_weight: 0.25}, {key: {source: ['d*', enum]}, weight: 0.5}]"
    config = compose([*plain, *WORDS, "mixture.kind=static", f"mixture.domains={domains}"])
    with DataPlane.open(config, Local()) as plane:
        batch = next(iter(plane))
        assert batch.loss_weights is not None
        assert batch.loss_weights.dtype == np.float32
        assert batch.loss_weights.tolist() == np.where(batch.domain_ids == 0, 0.25, 1.0).tolist()
        assert set(batch.domain_ids.tolist()) == {0, 1}
        plane.record(batch, np.ones((8, 16)))
        plane.state_dict()
        (statistics,) = plane.completed_statistics()
        assert statistics.loss_mean.tolist() == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"loss_weight is -1\.0, expected a number of at least 0"):
        compose([*plain, *WORDS, "mixture.kind=static", f"mixture.domains={domains.replace('0.25', '-1')}"])
    with DataPlane.open(compose([*plain, *WORDS]), Local()) as plane:
        assert next(iter(plane)).loss_weights is None


def test_trainers_that_do_not_multiply_by_loss_weights_refuse_them(collection: list[str]) -> None:
    plain = [word for word in collection if not word.startswith("mixture.")]
    domains = "[{key: {source: 'a*'}, weight: 0.5, loss_weight: W}, {key: {source: ['d*', enum]}, weight: 0.5}]"
    words = [*plain, *WORDS, "mixture.kind=static"]
    with (
        DataPlane.open(compose([*words, f"mixture.domains={domains.replace('W', '0.25')}"]), Local()) as plane,
        pytest.raises(ConfigError, match=r"domains\[0\]\.loss_weight is 0\.25, but PlaneTrainer does not multiply"),
    ):
        check_trainer_arguments(plane, None, {"eval_dataset": None}, None)
    with DataPlane.open(compose([*words, f"mixture.domains={domains.replace('W', '1')}"]), Local()) as plane:
        check_trainer_arguments(plane, None, {"eval_dataset": None}, None)
