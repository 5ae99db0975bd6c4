"""Ranks that each record a part of every sequence: the statistics are those of one rank, bit for bit."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import MAX_SEQUENCE_LOSS
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.steps.step_losses import StepLosses
from mixtera_hpc.errors import CommError, ConfigError
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks

WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "query.holdout.fraction=0.3",
    "training.validate_steps=2",
    "mixture.kind=dynamic",
    "mixture.algorithm={name:ado,warmup:2,refit_interval:1}",
]
STEPS = 9


class Mesh:
    """Part of a torch `DeviceMesh` that `DataPlane.open` reads, for ranks that are threads."""

    def __init__(self, dims: Sequence[str], shape: Sequence[int], rank: int) -> None:
        self.mesh_dim_names = tuple(dims)
        self._shape = tuple(shape)
        self.position = dict(zip(dims, map(int, np.unravel_index(rank, shape)), strict=True))

    def size(self, dim: int) -> int:
        return self._shape[dim]

    def get_local_rank(self, name: str) -> int:
        return self.position[name]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    words = [word for word in collection if not word.startswith("mixture.group_by")]
    return compose([*words, "mixture.group_by=[source]", *WORDS])


def loss_of(batch: Batch) -> Any:
    """Losses of a model: float32 numbers; some sequences have one that is not finite."""
    losses = (1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None] + abs(batch.step))).astype(np.float32)
    losses[batch.positions % 7 == 5, 3] = np.nan
    return losses


def figures(statistics: Any) -> tuple[Any, ...]:
    return (
        statistics.step,
        statistics.loss_sum.tolist(),
        statistics.num_tokens.tolist(),
        statistics.num_sequences.tolist(),
        statistics.num_nonfinite.tolist(),
    )


def train(config: Config, comm: Communicator, parts: Sequence[slice], look_ahead: int = 0, **layout: Any) -> Any:
    """Record the `parts` of every sequence; return the statistics, the weights of the last step, and a validation."""
    weights: dict[int, list[float]] = {}
    with DataPlane.open(config, comm, **layout) as plane:
        batches = iter(plane)
        held = [next(batches) for _ in range(look_ahead)]
        for _ in range(STEPS):
            held.append(next(batches))
            weights[held[-1].step] = plane.weights.tolist()
            batch = held.pop(0)
            for tokens in parts:
                for rows in (slice(0, 1), slice(1, None)):
                    plane.record(batch, loss_of(batch)[rows, tokens], rows=rows, tokens=tokens)
        validation = plane.held_out()
        if parts:
            for batch in validation.batches():
                for tokens in parts:
                    validation.record(batch, loss_of(batch)[:, tokens], tokens=tokens)
        held_out = figures(validation.reduce(STEPS))
        plane.state_dict()
        return [figures(step) for step in plane.completed_statistics()], weights[STEPS - 1], held_out


@pytest.fixture(scope="module")
def alone(config: Config) -> Any:
    return train(config, Local(), [slice(0, 16)])


HALVES = [[slice(0, 8)], [slice(8, 16)]]
ZIGZAG = [[slice(0, 4), slice(12, 16)], [slice(4, 8), slice(8, 12)]]
THIRDS = [[slice(0, 6)], [slice(6, 11)], [slice(11, 16)]]


@pytest.mark.slow
@pytest.mark.parametrize("dims", list(itertools.permutations(["dp", "pp", "cp"])), ids="-".join)
def test_halves_of_sequences_give_the_statistics_of_one_rank(config: Config, alone: Any, dims: Any) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(dims, (2, 2, 2), comm.rank)
        # Only the last stage of each pipeline has losses.
        parts = HALVES[mesh.position["cp"]] if mesh.position["pp"] == 1 else []
        return train(config, comm, parts, mesh=mesh, loss_parts=("cp",))

    assert run_ranks(8, serve) == [alone] * 8
    assert sum(alone[0][0][4]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("look_ahead", [0, 2])
@pytest.mark.parametrize("parts", [ZIGZAG, THIRDS], ids=["zigzag", "uneven"])
def test_any_cut_gives_the_same_statistics(config: Config, alone: Any, parts: Any, look_ahead: int) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(("cp", "tp"), (len(parts), 2), comm.rank)
        # Both tensor-parallel ranks of the first part record copies; one of each other part.
        own = parts[mesh.position["cp"]] if mesh.position["tp"] <= (mesh.position["cp"] == 0) else []
        return train(config, comm, own, look_ahead, mesh=mesh, data_dims=(), loss_parts=("cp",))

    assert run_ranks(2 * len(parts), serve) == [alone] * (2 * len(parts))


@pytest.mark.parametrize(
    ("parts", "recorded"),
    [
        ([[slice(0, 16)], [slice(0, 16)]], r"\[64, 64\]"),
        ([[slice(0, 8)], []], r"\[64, 0\]"),
        ([[slice(0, 8)], [slice(0, 8)]], r"\[64, 64\]"),
        ([[slice(0, 8)], [slice(9, 16)]], r"\[64, 56\]"),
    ],
    ids=["whole twice", "second missing", "first twice", "gap"],
)
def test_parts_that_do_not_fit_stop_the_run_and_name_the_ranks(config: Config, parts: Any, recorded: str) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(("dp", "cp"), (2, 2), comm.rank)
        own = HALVES if mesh.position["dp"] == 0 else parts
        return train(config, comm, own[mesh.position["cp"]], mesh=mesh, loss_parts=("cp",))

    # Four sequences of 16 tokens for each group.
    recorded = recorded.replace("64", "(64|32)").replace("56", "28")
    with pytest.raises(CommError, match=rf"Step 0 was recorded in part: ranks \[2, 3\] recorded {recorded} tokens"):
        run_ranks(4, serve)


def test_a_group_that_records_nothing_is_named(config: Config) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(("dp", "cp"), (2, 2), comm.rank)
        own = HALVES[mesh.position["cp"]] if mesh.position["dp"] == 0 else []
        return train(config, comm, own, mesh=mesh, loss_parts=("cp",))

    with pytest.raises(CommError, match=r"Step 0 was recorded in part: ranks \[2, 3\] did not record"):
        run_ranks(4, serve)


def test_steps_that_nobody_records_are_no_observation(config: Config) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(("cp",), (2,), comm.rank)
        return train(config, comm, [], mesh=mesh, data_dims=(), loss_parts=("cp",))

    for steps, _, held_out in run_ranks(2, serve):
        assert {sum(figures_of_step[2]) for figures_of_step in steps} == {0}
        assert sum(held_out[2]) == 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"loss_parts": ("cp",)}, r"but mesh is None"),
        ({"mesh": Mesh(("dp", "cp"), (1, 1), 0), "loss_parts": ("tp",)}, r"loss_parts names 'tp', but the mesh has"),
        ({"mesh": Mesh(("dp", "cp"), (1, 1), 0), "loss_parts": ("dp",)}, r"both name \['dp'\]"),
    ],
)
def test_loss_parts_that_do_not_fit_the_mesh_are_refused(config: Config, layout: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataPlane.open(config, Local(), **layout)


def test_ranks_that_name_other_parts_are_refused(config: Config) -> None:
    def serve(comm: ThreadCommunicator) -> Any:
        mesh = Mesh(("dp", "cp"), (1, 2), comm.rank)
        return DataPlane.open(config, comm, mesh=mesh, loss_parts=("cp",) if comm.rank else ())

    with pytest.raises(ConfigError, match="not the same ones in every data-parallel group"):
        run_ranks(2, serve)


def batch_of(num_tokens: int) -> Batch:
    return Batch(
        step=0,
        domain_ids=np.zeros(2, np.int64),
        positions=np.arange(2),
        tokens=np.zeros((2, num_tokens + 1), np.int64),
        loss_mask=np.ones((2, num_tokens), np.bool_),
        document_ids=np.zeros((2, num_tokens + 1), np.int32),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_does_not_depend_on_the_order_of_its_terms(dtype: Any) -> None:
    losses = np.random.default_rng(0).lognormal(0, 2, (2, 4096)).astype(dtype)
    totals = set()
    for order in (np.arange(4096), np.arange(4096)[::-1], np.argsort(losses[0])):
        step = StepLosses(batch_of(4096), 1)
        step.add(losses[:, order], slice(None), None, None)
        totals.add(tuple(step.total().ravel().tolist()))
    assert len(totals) == 1
    assert totals.pop()[0] / 2**24 == pytest.approx(losses.sum(dtype=np.float64), rel=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 1.2 * MAX_SEQUENCE_LOSS, MAX_SEQUENCE_LOSS / 2])
def test_a_sequence_whose_loss_is_not_finite_is_left_out_alone(bad: float) -> None:
    losses = np.full((2, 4), 1.0)
    losses[0, :2] = bad
    step = StepLosses(batch_of(4), 1)
    step.add(losses, slice(None), None, None)
    assert step.total()[:, 0].tolist() == [4 << 24, 4, 2, 1]
