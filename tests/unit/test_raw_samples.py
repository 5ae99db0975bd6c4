"""Samples of blocks stay packed until their batch is made, whatever formats a read mixes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, items_per_read, steps_per_read
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers

ROWS_PER_FILE = 120
BATCH = 8
ZST = "zst"
PARQUET = "parquet"
ARROW = "arrow"
JSON = "jsonl"
WRITE: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    ZST: lambda folder, rows: writers.write_compressed(folder, rows, "zst", frame_rows=40),
    PARQUET: writers.write_parquet,
    ARROW: writers.write_arrow,
    JSON: writers.write_jsonl,
}


def row_of(number: int) -> dict[str, Any]:
    return {"text": f"row {number}", "of_test": {"number": number}}


def make_source(folder: Path, names: tuple[str, ...]) -> Source:
    """Return the rows 0, 1, … in one file of each format."""
    for number, name in enumerate(names):
        (folder / f"data/{number}").mkdir(parents=True)
        first = number * ROWS_PER_FILE
        WRITE[name](folder / f"data/{number}", [row_of(row) for row in range(first, first + ROWS_PER_FILE)])
    words = [f"data.root={folder / 'data'}", f"index.path={folder / 'i.h5'}", "data.materialize=never"]
    config = compose([*words, "mixture.unit=samples", f"dataplane.global_batch_size={BATCH}"])
    build_index(config)
    return open_source(config, Local())


def num_objects() -> int:
    """Return the number of samples that are objects."""
    return sum(type(value) is dict and "of_test" in value for value in gc.get_objects())


def payloads_of(batch: Batch) -> list[Any]:
    assert batch.payloads is not None
    return batch.payloads


@pytest.mark.parametrize("names", [(ZST,), (PARQUET,), (ARROW,), (ZST, PARQUET, JSON, ARROW)])
def test_only_the_samples_of_the_batch_are_objects(names: tuple[str, ...], tmp_path: Path) -> None:
    source = make_source(tmp_path, names)
    maker = BatchMaker(source, BatchSlice(), audit=False)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    num_steps = plan.num_steps
    assert steps_per_read(source, BatchSlice(), items_per_read(source)) > num_steps > 4
    # One step per read.
    alone = [payloads_of(batch) for step in range(num_steps) for batch in maker.batches_of(plan, range(step, step + 1))]
    numbers = [[sample["of_test"]["number"] for sample in samples] for samples in alone]
    del alone
    served: list[list[int]] = []
    for batch in maker.batches(plan, 0):
        samples = payloads_of(batch)
        assert all(sample == row_of(sample["of_test"]["number"]) for sample in samples)
        served.append([sample["of_test"]["number"] for sample in samples])
        # Those of this batch, and perhaps of the one before.
        assert num_objects() <= 2 * BATCH
    assert served == numbers
    maker.close()
