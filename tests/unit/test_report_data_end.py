"""`report` and `plan` state what is left over at the end of the data."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.trace.forecast import forecast_mixture


@pytest.mark.parametrize(
    ("unit", "last_batch", "fate"),
    [
        ("tokens", "drop", "too few for a global batch and not served; "),
        ("tokens", "pad", "served with padding; "),
        ("samples", "drop", "too few for a global batch and not served"),
    ],
)
def test_the_report_says_what_is_left_over(
    unit: str, last_batch: str, fate: str, collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1", f"mixture.unit={unit}"]
    sizes = [
        "dataplane.global_batch_size=77",
        "dataplane.seq_len=64",
        "dataplane.chunk_steps=3",
        "training.log_every=1",
    ]
    config = compose([*collection, *words, *sizes, "training.log_every=1", f"dataplane.last_batch={last_batch}"])
    folder = RunFolder(tmp_path / "a/20260101-000000-aaaa")
    with DataPlane.open(config, Local(), folder=folder) as plane:
        num_steps = 0
        for batch in plane:
            plane.record(batch, np.ones(batch.loss_mask.shape if unit == "tokens" else len(batch.positions)))
            num_steps += 1

    assert main(["report", str(folder.path), "--json"]) == 0
    end = json.loads(capsys.readouterr().out)["data_end"]
    source = open_source(config, Local())
    assert end["sequences"] == forecast_mixture(source, 10_000).left_over > 0
    assert (end["unit"], end["is_padded"]) == (unit, last_batch == "pad")
    # Every token of every domain is in a sequence, or too few for one.
    sequences = num_steps * 77 + (end["sequences"] if last_batch == "drop" else end["sequences"] - 77)
    served = sequences * 64 + np.count_nonzero(source.planner.capacity) if unit == "tokens" else sequences
    assert end["tokens"] == source.layout.epoch_items().sum() - served

    assert main(["report", str(folder.path)]) == 0
    assert fate in " ".join(capsys.readouterr().out.split())


def test_a_run_that_ends_before_the_data_has_nothing_left_over(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mixture.max_epochs=1", "mixture.on_exhausted=redistribute", "mixture.unit=samples"]
    config = compose([*collection, *words, "dataplane.global_batch_size=77", "training.log_every=1"])
    folder = RunFolder(tmp_path / "a/20260101-000000-aaaa")
    with DataPlane.open(config, Local(), folder=folder) as plane:
        plane.record(next(iter(plane)), np.ones(77))
    assert main(["report", str(folder.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_end"] is None
