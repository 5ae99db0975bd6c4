"""Samples become one dict: stacked, padded or listed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.collation import collate_samples
from mixtera_hpc.integrations.torch import PlaneDataset


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], torch.tensor([1, 2, 3])),
        ([0.5, 1.5], torch.tensor([0.5, 1.5], dtype=torch.float64)),
        ([True, False], torch.tensor([True, False])),
        ([np.ones((2, 3), np.uint8)] * 2, torch.ones((2, 2, 3), dtype=torch.uint8)),
        ([torch.zeros(2), torch.ones(2)], torch.tensor([[0.0, 0], [1, 1]])),
    ],
)
def test_values_of_one_shape_are_stacked(values: list[Any], expected: torch.Tensor) -> None:
    fields = collate_samples([{"x": value} for value in values])
    assert fields.keys() == {"x"} and fields["x"].dtype == expected.dtype and torch.equal(fields["x"], expected)


def test_arrays_of_different_lengths_are_padded() -> None:
    fields = collate_samples([{"ids": np.arange(1, n + 1)} for n in (3, 0, 2)])
    assert fields["ids"].tolist() == [[1, 2, 3], [0, 0, 0], [1, 2, 0]]
    assert fields["ids_lengths"].tolist() == [3, 0, 2]


@pytest.mark.parametrize("values", [["a", "b"], [b"a", None], [[1, 2], [3]], [np.array(["a"])] * 2, [{"a": 1}, {}]])
def test_other_values_are_listed(values: list[Any]) -> None:
    assert collate_samples([{"x": value} for value in values]) == {"x": values}


def test_arrays_that_do_not_fit_together_are_listed() -> None:
    fields = collate_samples([{"image": np.ones((2, 3))}, {"image": np.ones((2, 4))}])
    assert [tuple(image.shape) for image in fields["image"]] == [(2, 3), (2, 4)]


@pytest.mark.parametrize("samples", [[{"a": 1}, {"b": 1}], [3, 4], ["text"]])
def test_samples_without_common_fields_stay_a_list(samples: list[Any]) -> None:
    assert collate_samples(samples) == {"samples": samples}


def test_the_loader_leaves_padding_out_and_losses_fit(collection: list[str]) -> None:
    words = ["mixture.unit=samples", "dataplane.global_batch_size=50", "dataplane.last_batch=pad"]
    end = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1"]
    with DataPlane.open(compose([*collection, *words, *end]), comm=Local()) as plane:
        num_samples = []
        for fields in DataLoader(PlaneDataset(plane, micro_batch_size=25), batch_size=None):
            num_samples.append(len(fields["text"]))
            assert len(fields["positions"]) == len(fields["domain_ids"]) == len(fields["text"])
            plane.record(fields, torch.ones(len(fields["text"])))
        plane.state_dict()
        assert num_samples == [25] * 19 + [5]
        assert sum(int(of_step.num_sequences.sum()) for of_step in plane.completed_statistics()) == 480


def test_a_field_with_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    from mixtera_hpc.index.build.build import build_index

    (tmp_path / "a.jsonl").write_text('{"step": 1}\n' * 8)
    overrides = [f"data.root={tmp_path}", "data.text=null", "mixture.unit=samples", "dataplane.global_batch_size=2"]
    build_index(compose(overrides))
    with DataPlane.open(compose(overrides), comm=Local()) as plane:
        with pytest.raises(ConfigError, match=r"have the fields step, which a PlaneDataset adds itself"):
            next(iter(PlaneDataset(plane)))
        plane.close(orderly=False)
