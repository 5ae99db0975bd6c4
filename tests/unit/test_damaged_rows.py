"""A row that is damaged under a run, in a place that no comparison of the file sees."""

import logging
import os
import random
import string
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker, items_per_read, steps_per_read
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.text_sample import sample_texts
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing import writers

NUM_ROWS = 400
ROW_BYTES = 8192
"""The file has more than 2 MiB, so a change in its middle does not change the fingerprint."""
BATCH = 4


ROWS_PER_FRAME = 10


def text_of(row: int) -> str:
    """Return the text of a row: its number, and letters of which compression saves nothing."""
    return f"{row:06}" + "".join(random.Random(row).choices(string.ascii_letters, k=ROW_BYTES))


@pytest.fixture(params=["jsonl", "zst"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """Return the configuration of a file, plain or in compressed frames that contain the characters as they are."""
    rows = [{"text": text_of(number)} for number in range(NUM_ROWS)]
    if request.param == "jsonl":
        writers.write_jsonl(tmp_path, rows)
    else:
        lines = writers.json_lines(rows)
        compress = zstandard.ZstdCompressor(level=-100).compress
        frames = [
            compress(b"".join(lines[first : first + ROWS_PER_FRAME])) for first in range(0, NUM_ROWS, ROWS_PER_FRAME)
        ]
        (tmp_path / "shard.jsonl.zst").write_bytes(b"".join(frames))
    words = [
        f"data.root={tmp_path}",
        f"index.path={tmp_path / 'i.h5'}",
        "mixture.unit=samples",
        "data.materialize=never",
    ]
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
    """Overwrite characters of a row; size and modification time stay as they are."""
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    begin = content.index(text_of(row)[ROW_BYTES // 2 :][:16].encode())
    content[begin : begin + 4] = b"\x00\x00\x00\x00"
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_steps_before_a_damaged_row_are_served_and_it_is_named(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(config, Local())
    order, error = served_until_error(source)
    assert not error
    assert len(order) >= NUM_ROWS
    [shard] = Path(config.data.root or "").glob("shard.*")
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


def test_a_damaged_row_is_named_where_texts_are_read(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    [shard] = Path(config.data.root or "").glob("shard.*")
    damage(shard, NUM_ROWS // 2)
    with pytest.raises(DataError, match=shard.name), caplog.at_level(logging.WARNING, "mixtera_hpc"):
        list(sample_texts(config, 1 << 30))
    assert [r for r in caplog.messages if "again, one shard after the other" in r and shard.name in r]
