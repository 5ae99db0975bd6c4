"""A row that is damaged under a run, in a place that no comparison of the file sees."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, items_per_read, steps_per_read
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers

NUM_ROWS = 400
ROW_BYTES = 8192
"""The file has more than 2 MiB, so a change in its middle does not change the fingerprint."""
BATCH = 4


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = [{"text": f"{number:06}" + "x" * ROW_BYTES} for number in range(NUM_ROWS)]
    writers.write_jsonl(tmp_path, rows)
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", "mixture.unit=samples"]
    built = compose([*words, f"dataplane.global_batch_size={BATCH}", "mixture.on_exhausted=redistribute"])
    build_index(built)
    return built


def served_until_error(source: Source) -> tuple[list[str], str]:
    """Return the texts that are served before an error, and the error."""
    maker = BatchMaker(source, BatchSlice(), audit=False)
    texts: list[str] = []
    state = PlannerState.start(source.num_domains)
    try:
        while len(texts) < NUM_ROWS:
            plan, state = source.planner.plan(state, source.weights)
            for batch in maker.batches(plan, 0):
                texts += [payload["text"][:6] for payload in batch.payloads or []]
    except DataError as error:
        return texts, str(error)
    finally:
        maker.close()
    return texts, ""


def damage(shard: Path, row: int) -> None:
    """Overwrite the begin of a row; size and modification time stay as they are."""
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    begin = content.index(f"{row:06}".encode())
    content[begin - 4 : begin] = b"\x00\x00\x00\x00"
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_steps_before_a_damaged_row_are_served_and_it_is_named(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(config, Local())
    order, error = served_until_error(source)
    assert not error
    assert len(order) >= NUM_ROWS
    [shard] = Path(config.data.root or "").glob("*.jsonl")
    rows = np.array([int(text) for text in order])
    # A row in the middle of the file, and in the middle of a read of several steps.
    assert steps_per_read(source, BatchSlice(), items_per_read(source)) > 10
    step = next(step for step in range(5, 90) if 180 < rows[step * BATCH] < 220)
    damage(shard, int(rows[step * BATCH]))
    with caplog.at_level(logging.WARNING, "mixtera_hpc"):
        served, error = served_until_error(open_source(config, Local()))
    assert served == order[: step * BATCH]
    assert shard.name in error
    assert [r for r in caplog.messages if "again, one shard after the other" in r and shard.name in r]
