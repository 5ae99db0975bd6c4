"""`PlaneDataset` in torch loaders: same batches, resume at every step, and no worker processes."""

from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.torch import PlaneDataset

pytestmark = pytest.mark.slow
"""Starts loaders of torch."""

WORDS = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.chunk_steps=3", "dataplane.audit=true"]
STEPS = 10


def open_plane(collection: list[str]) -> DataPlane:
    return DataPlane.open(compose([*collection, *WORDS]), Local())


def served(loader: Any, count: int) -> list[list[str]]:
    return [batch.digests for batch, _ in zip(loader, range(count), strict=False)]


@pytest.fixture(scope="module")
def expected(collection: list[str]) -> list[list[str]]:
    with open_plane(collection) as plane:
        return served(plane, STEPS)


def test_a_loader_yields_the_batches_of_the_data_plane(collection: list[str], expected: list[list[str]]) -> None:
    with open_plane(collection) as plane:
        assert served(DataLoader(PlaneDataset(plane), batch_size=None), STEPS) == expected


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_stateful_loader_resumes_at_the_saved_step(
    collection: list[str], expected: list[list[str]], stop: int
) -> None:
    with open_plane(collection) as plane:
        loader = StatefulDataLoader(PlaneDataset(plane), batch_size=None)
        batches = iter(loader)
        first = []
        for _ in range(stop):
            batch = next(batches)
            first.append(batch.digests)
            plane.finish(batch)
        state = loader.state_dict()
    with open_plane(collection) as plane:
        loader = StatefulDataLoader(PlaneDataset(plane), batch_size=None)
        loader.load_state_dict(state)
        assert [*first, *served(loader, STEPS - stop)] == expected


def test_losses_recorded_in_a_loop_over_a_loader_are_reduced(collection: list[str]) -> None:
    with open_plane(collection) as plane:
        batches = iter(StatefulDataLoader(PlaneDataset(plane), batch_size=None))
        for _ in range(3):
            batch = next(batches)
            plane.record(batch, (batch.tokens[:, 1:] % 7).astype("float32"))
        plane.state_dict()
        assert [statistics.step for statistics in plane.completed_statistics()] == [0, 1, 2]


def test_a_loader_yields_the_result_of_the_transform(collection: list[str]) -> None:
    with open_plane(collection) as plane:
        loader = DataLoader(PlaneDataset(plane, lambda batch: {"input_ids": batch.tokens[:, :-1]}), batch_size=None)
        assert next(iter(loader))["input_ids"].shape == (4, 32)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_of_a_loader_are_refused(collection: list[str], context: str) -> None:
    with open_plane(collection) as plane:
        loader = DataLoader(PlaneDataset(plane), batch_size=None, num_workers=1, multiprocessing_context=context)
        with pytest.raises(ConfigError, match=r"Set num_workers=0 .* set dataplane\.workers"):
            next(iter(loader))
