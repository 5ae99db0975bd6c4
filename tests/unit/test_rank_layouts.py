"""Layouts of model-parallel ranks: peers get the same batches, wherever they are, and losses count once."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.reading.rank_layout import coordinate_in_mesh
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks
from mixtera_hpc.trace.rank_filter import is_served_to
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

WORDS = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=3", "dataplane.audit=true"]
STEPS = 7


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS])


def loss_of(batch: Batch) -> Any:
    return 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None] + batch.step)


def train(plane: DataPlane, records: bool) -> tuple[list[Any], list[Any]]:
    """Return what one rank was served, and the statistics of all ranks."""
    served = []
    for batch in plane:
        served.append((batch.positions.tolist(), batch.digests))
        if records:
            plane.record(batch, loss_of(batch))
        if batch.step + 1 == STEPS:
            break
    plane.state_dict()
    return served, [(s.loss_sum.tolist(), s.num_tokens.tolist()) for s in plane.completed_statistics()]


@pytest.fixture(scope="module")
def alone(config: Config) -> tuple[list[Any], list[Any]]:
    with DataPlane.open(config, Local()) as plane:
        return train(plane, records=True)


@pytest.mark.parametrize("dims", list(itertools.permutations(["dp", "pp", "tp"])), ids="-".join)
def test_peers_get_the_same_batches_in_every_order_of_dimensions(
    config: Config, alone: tuple[list[Any], list[Any]], tmp_path: Path, dims: tuple[str, ...]
) -> None:
    # Rank r is at the position of r in an array of shape (2, 2, 2) whose axes are `dims`.
    coordinates = [dict(zip(dims, np.unravel_index(rank, (2, 2, 2)), strict=True)) for rank in range(8)]
    folder = RunFolder(tmp_path / "run")

    def serve(comm: ThreadCommunicator) -> tuple[list[Any], list[Any]]:
        own = coordinates[comm.rank]
        layout = (int(own["dp"]), 2)
        with DataPlane.open(config, comm, folder=folder, attempt=1, data_parallel=layout) as plane:
            # Only the last stage of each pipeline has losses.
            return train(plane, records=own["pp"] == 1)

    parts = run_ranks(8, serve)
    assert all(statistics == alone[1] for _, statistics in parts)
    for rank, (served, _) in enumerate(parts):
        first = 4 * int(coordinates[rank]["dp"])
        assert [positions for positions, _ in served] == [list(range(first, first + 4))] * STEPS
        assert [digests for _, digests in served] == [digests[first : first + 4] for _, digests in alone[0]]

    history = History(folder.journal)
    assert verify_run(ServedRun(folder, config)).num_steps == STEPS
    attempt = history.attempts[0]
    for rank in range(8):
        traced = [p for p in range(8) if is_served_to(rank, attempt, {"rank": attempt.rank_of(0, p)})]
        assert traced == parts[rank][0][0][0]
    assert json.loads(folder.journal.read_text().splitlines()[0])["model_parallel_size"] == 4


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ([(0, 2), (0, 2)], r"coordinates \[0, 0\] of sizes \[2\]"),
        ([(0, 2), (1, 4)], r"of sizes \[2, 4\]"),
        ([(0, 2), None], r"coordinates \[0, -1\]"),
        ([(1, 2), (2, 2)], r"coordinates \[1, 2\]"),
    ],
)
def test_a_layout_that_does_not_fit_together_is_refused(config: Config, layouts: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_ranks(2, lambda comm: DataPlane.open(config, comm, data_parallel=layouts[comm.rank]))


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (["dataplane.model_parallel_size=2"], 2, "Remove dataplane.model_parallel_size"),
        (["dataplane.global_batch_size=7"], 2, "cannot be shared evenly by 2 data-parallel groups"),
    ],
)
def test_a_layout_that_the_settings_contradict_is_refused(
    collection: list[str], words: list[str], size: int, message: str
) -> None:
    config = compose([*collection, *WORDS, *words])
    with pytest.raises(ConfigError, match=message):
        run_ranks(size, lambda comm: DataPlane.open(config, comm, data_parallel=(comm.rank, size)))


@pytest.mark.parametrize("rank", [0, 3, 5, 6])
def test_a_device_mesh_names_the_coordinate_of_a_rank(rank: int) -> None:
    # Torch's own stand-in for a process group: a real mesh of 8 ranks in one process.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        for dims in itertools.permutations(["dp", "pp", "tp"]):
            mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=dims)
            position = dict(zip(dims, np.unravel_index(rank, (2, 2, 2)), strict=True))
            assert coordinate_in_mesh(mesh, ("dp",)) == (position["dp"], 2)
            assert coordinate_in_mesh(mesh, ("dp", "pp")) == (2 * position["dp"] + position["pp"], 4)
        with pytest.raises(ConfigError, match=r"data_dims names 'data', but the mesh has the dimensions \['tp'"):
            coordinate_in_mesh(mesh, ("data",))
    finally:
        torch.distributed.destroy_process_group()


def test_a_mesh_gives_the_same_batches_as_its_coordinates(config: Config, alone: tuple[list[Any], list[Any]]) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "dp"))
        with DataPlane.open(config, Local(), mesh=mesh) as plane:
            assert train(plane, records=True) == alone
    finally:
        torch.distributed.destroy_process_group()
