"""Held-out losses of an own loop: the same for every layout of ranks, each sequence counted once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import BatchStageConfig, Config
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.errors import CommError, ConfigError
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks

pytestmark = pytest.mark.slow
"""Opens data planes on up to 8 ranks."""

WORDS = [
    "query.holdout.fraction=0.3",
    "training.validate_steps=3",
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS])


def loss_of(batch: Batch) -> Any:
    return 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None])


def totals(statistics: DomainStatistics) -> tuple[int, list[float], list[int], list[int]]:
    return (
        statistics.step,
        statistics.loss_sum.tolist(),
        statistics.num_tokens.tolist(),
        statistics.num_sequences.tolist(),
    )


def validate(config: Config, comm: Communicator, is_recording: bool = True, **layout: Any) -> Any:
    """Train on two batches, validate, train on two more; return the statistics of the validation."""
    with DataPlane.open(config, comm, **layout) as plane:
        batches = iter(plane)
        plane.record(next(batches), np.ones((plane.local_batch_size, 16)))
        held_out = plane.held_out()
        for batch in held_out.batches():
            if is_recording:
                half = {"step": batch.step, "positions": batch.positions[::2]}
                held_out.record(half, loss_of(batch)[::2])
                held_out.record({"step": batch.step, "positions": batch.positions[1::2]}, loss_of(batch)[1::2])
        statistics = held_out.reduce(2)
        plane.record(next(batches), np.ones((plane.local_batch_size, 16)))
        plane.state_dict()
        assert [step.step for step in plane.completed_statistics()] == [0, 1]
    return totals(statistics)


@pytest.fixture(scope="module")
def alone(config: Config) -> Any:
    return validate(config, Local())


@pytest.mark.parametrize("recording", [[0], [1], [0, 1]], ids=["first peer", "last peer", "both peers"])
@pytest.mark.parametrize("are_neighbours", [True, False])
def test_held_out_losses_do_not_depend_on_the_layout_or_on_who_records(
    config: Config, alone: Any, recording: list[int], are_neighbours: bool
) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        # Peers are ranks 2n and 2n + 1, or ranks n and n + 2.
        group, peer = (comm.rank // 2, comm.rank % 2) if are_neighbours else (comm.rank % 2, comm.rank // 2)
        return validate(config, comm, peer in recording, data_parallel=(group, 2))

    assert run_ranks(4, serve) == [alone] * 4
    assert sum(alone[3]) == 24


def test_a_group_that_records_nothing_is_named(config: Config) -> None:
    with pytest.raises(CommError, match=r"in part: ranks \[2, 3\] did not record"):
        run_ranks(4, lambda comm: validate(config, comm, comm.rank < 2, data_parallel=(comm.rank // 2, 2)))


def test_a_held_out_batch_is_not_taken_for_one_of_the_training(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        held_out = plane.held_out()
        trained = next(iter(plane))
        validated = next(held_out.batches())
        with pytest.raises(ValueError, match=r"record\(\) was given step -1, which is finished or was not handed out"):
            plane.record(validated, loss_of(validated))
        with pytest.raises(ValueError, match=r"given step 0.*\n.*give batches of the training to DataPlane\.record"):
            held_out.record(trained, loss_of(trained))


def test_nothing_recorded_is_no_observation(config: Config) -> None:
    assert sum(validate(config, Local(), is_recording=False)[2]) == 0


def test_the_weights_of_the_current_chunk_are_known_on_every_rank(config: Config) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        with DataPlane.open(config, comm) as plane:
            before = plane.weights.tolist()
            next(iter(plane))
            return before, plane.weights.tolist()

    (before, weights), other = run_ranks(2, serve)
    assert other == (before, weights)
    assert set(before) == {0.0}
    assert sum(weights) == pytest.approx(1.0)
    assert len(weights) == len(before) > 1


def test_batches_of_a_validation_that_the_ranks_cannot_share_are_refused(config: Config) -> None:
    # Three ranks can share the coming batches of a ramp, but a validation keeps the first size.
    ramp = replace(config.dataplane, batch_schedule=[BatchStageConfig(start=1, size=12)])

    def open_held_out(comm: Communicator) -> None:
        with DataPlane.open(replace(config, dataplane=ramp), comm) as plane:
            plane.held_out()

    with pytest.raises(ConfigError, match=r"global_batch_size=8 is the batch of every validation"):
        run_ranks(3, open_held_out)
