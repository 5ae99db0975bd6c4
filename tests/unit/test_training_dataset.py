"""`PlaneDataset` in torch loaders: same batches, resume at every step, and no worker processes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.steps.digests import sequence_digest
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.torch import PlaneDataset
from mixtera_hpc.testing.thread_ranks import run_ranks

pytestmark = pytest.mark.slow
"""Starts loaders of torch."""

WORDS = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.chunk_steps=3", "dataplane.audit=true"]
STEPS = 10


def open_plane(collection: list[str]) -> DataPlane:
    return DataPlane.open(compose([*collection, *WORDS]), Local())


def digests_of(batch: Any) -> list[str]:
    tokens = batch["tokens"].numpy() if isinstance(batch, dict) else batch.tokens
    return [sequence_digest(row) for row in tokens]


def served(loader: Any, count: int) -> list[list[str]]:
    return [digests_of(batch) for batch, _ in zip(loader, range(count), strict=False)]


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
            first.append(digests_of(batch))
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
            plane.record(batch, (batch["tokens"][:, 1:] % 7).float())
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


def test_the_default_is_a_dict_of_tensors_with_the_tokens_first(collection: list[str]) -> None:
    with open_plane(collection) as plane, open_plane(collection) as other:
        item = next(iter(DataLoader(PlaneDataset(plane), batch_size=None)))
        batch = next(iter(other))
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in item.items()}
    assert shapes == {
        "tokens": ((4, 33), torch.int64),
        "loss_mask": ((4, 32), torch.bool),
        "document_ids": ((4, 33), torch.int32),
        "position_ids": ((4, 33), torch.int32),
        "positions": ((4,), torch.int64),
        "domain_ids": ((4,), torch.int64),
        "is_padding": ((4,), torch.bool),
        "step": ((), torch.int64),
    }
    assert list(item) == list(shapes)
    assert all(np.array_equal(tensor.numpy(), getattr(batch, name)) for name, tensor in item.items())


def train(plane: DataPlane, loader: Any) -> dict[int, tuple[list[float], list[int]]]:
    """Record every micro-batch of a loader; return the statistics by step."""
    for micro in loader:
        plane.record(micro, (micro["tokens"][:, 1:] % 7).float())
    plane.state_dict()
    return {step.step: (step.loss_sum.tolist(), step.num_tokens.tolist()) for step in plane.completed_statistics()}


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_are_recorded_without_naming_their_rows(collection: list[str], size: int) -> None:
    with open_plane(collection) as plane:
        whole = train(plane, DataLoader(PlaneDataset(plane, num_steps=6), batch_size=None))
    with open_plane(collection) as plane:
        dataset = PlaneDataset(plane, micro_batch_size=size, num_steps=6)
        assert len(dataset) == 6 * 4 // size
        assert next(iter(dataset))["tokens"].shape == (size, 33)
    with open_plane(collection) as plane:
        loader = DataLoader(PlaneDataset(plane, micro_batch_size=size, num_steps=6), batch_size=None)
        assert train(plane, loader) == whole
    assert sorted(whole) == list(range(6))


def test_a_micro_batch_that_belongs_to_no_row_is_refused(collection: list[str]) -> None:
    with open_plane(collection) as plane:
        micro = next(iter(PlaneDataset(plane, micro_batch_size=2)))
        for wrong in ([0, 0], [3, 4]):
            with pytest.raises(ValueError, match="but this rank has 0 to 3, each once"):
                plane.record(micro | {"positions": torch.tensor(wrong)}, torch.ones(2, 32))


def test_a_micro_batch_size_that_does_not_divide_is_refused(collection: list[str]) -> None:
    with (
        open_plane(collection) as plane,
        pytest.raises(ConfigError, match=r"micro_batch_size=3 does not divide the 4 .*\n.* accumulation steps"),
    ):
        PlaneDataset(plane, micro_batch_size=3)


def test_the_iteration_ends_after_num_steps_also_after_a_resume(collection: list[str]) -> None:
    with open_plane(collection) as plane:
        first = [item["step"].item() for item in PlaneDataset(plane, num_steps=3)]
        plane.finish({"step": 2})
        state = plane.state_dict()
    with open_plane(collection) as plane:
        plane.load_state_dict(state)
        dataset = PlaneDataset(plane, num_steps=5)
        second = [item["step"].item() for item in DataLoader(dataset, batch_size=None)]
        assert len(dataset) == 5
        assert list(dataset) == []
    assert [*first, *second] == [0, 1, 2, 3, 4]


def test_a_dataset_without_num_steps_has_no_length(collection: list[str]) -> None:
    with open_plane(collection) as plane, pytest.raises(TypeError, match="num_steps"):
        len(PlaneDataset(plane))


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_a_loader_that_stacks_batches_is_refused(collection: list[str], loader: Any) -> None:
    with open_plane(collection) as plane, pytest.raises(ConfigError, match=r"would stack whole batches.*\n.*=None"):
        next(iter(loader(PlaneDataset(plane), batch_size=8)))


def test_micro_batches_follow_a_ramp(collection: list[str]) -> None:
    config = compose([*collection, *WORDS, "dataplane.batch_schedule=[{start: 2, size: 8}]"])
    sizes = {}
    for name, words in {"of one size": {"micro_batch_size": 2}, "of one number": {"num_micro_batches": 2}}.items():
        with DataPlane.open(config, Local()) as plane:
            dataset = PlaneDataset(plane, num_steps=4, **words)
            batches = list(DataLoader(dataset, batch_size=None))
            assert len(dataset) == len(batches)
            sizes[name] = [(int(batch["step"]), len(batch["positions"])) for batch in batches]
    assert sizes["of one size"] == [(step, 2) for step in (0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)]
    assert sizes["of one number"] == [(0, 2), (0, 2), (1, 2), (1, 2), (2, 4), (2, 4), (3, 4), (3, 4)]
    with DataPlane.open(config, Local()) as plane, pytest.raises(ConfigError, match="micro_batch_size=3"):
        PlaneDataset(plane, micro_batch_size=3)


def test_only_the_coming_stages_of_a_ramp_must_fit_the_micro_batches(collection: list[str]) -> None:
    config = compose([*collection, *WORDS, "dataplane.batch_schedule=[{start: 2, size: 8}]"])
    with DataPlane.open(config, Local()) as plane, pytest.raises(ConfigError, match=r"=8 does not divide the 4 seq"):
        next(iter(PlaneDataset(plane, micro_batch_size=8)))
    with DataPlane.open(config, Local()) as plane:
        batches = iter(plane)
        plane.finish([next(batches) for _ in range(2)][-1])
        state = plane.state_dict()
    with DataPlane.open(config, Local()) as plane:
        dataset = PlaneDataset(plane, micro_batch_size=8)
        plane.load_state_dict(state)
        first = next(iter(dataset))
        assert (int(first["step"]), len(first["positions"])) == (2, 8)


def test_samples_come_in_micro_batches_up_to_the_budget(collection: list[str]) -> None:
    budget = ["mixture.unit=samples", "dataplane.sample_cost=tokens", "dataplane.sample_budget=600"]
    config = compose([*collection, *WORDS, *budget, "query.where='tokens <= 600'"])
    with DataPlane.open(config, Local()) as plane:
        rows = dict.fromkeys(range(3), 0)
        for batch in DataLoader(PlaneDataset(plane, num_steps=3), batch_size=None):
            rows[int(batch["step"])] += len(batch["positions"])
            plane.record(batch, np.ones(len(batch["positions"])))
        assert rows == {0: 4, 1: 4, 2: 4}
        with pytest.raises(TypeError, match="differs from step to step"):
            len(PlaneDataset(plane, num_steps=3))
        with pytest.raises(ConfigError, match="Remove one of them"):
            PlaneDataset(plane, micro_batch_size=2)


def test_every_rank_records_its_empty_micro_batches(collection: list[str]) -> None:
    budget = ["mixture.unit=samples", "dataplane.sample_cost=tokens", "dataplane.sample_budget=600"]
    size = "dataplane.global_batch_size=12"
    config = compose([*collection, *WORDS, *budget, size, "query.where='tokens <= 600'", "dataplane.workers=0"])

    def counts(comm: Communicator) -> list[list[int]]:
        sizes = []
        with DataPlane.open(config, comm) as plane:
            for batch, _ in zip(plane, range(30), strict=False):
                for rows in batch.micro_batches:
                    plane.record(batch, np.ones(len((batch.payloads or [])[rows])), rows=rows)
                sizes.append([rows.stop - rows.start for rows in batch.micro_batches])
            plane.state_dict()
        return sizes

    by_rank = run_ranks(3, counts)
    assert len({tuple(map(len, sizes)) for sizes in by_rank}) == 1
    assert all(sum(sizes) == 4 for of_rank in by_rank for sizes in of_rank)
    assert any(0 in sizes for of_rank in by_rank for sizes in of_rank)
