"""Tables of the index in memory of the node: every rank and process sees the same arrays."""

import gc
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.processes import table_memory
from mixtera_hpc.dataplane.reading.processes.table_memory import map_tables, share_tables
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.testing.thread_ranks import run_ranks
from tests.unit.open_files import num_open

ARRAYS = [
    np.arange(200_000, dtype=np.int64),
    np.zeros((0, 3), np.int32),
    np.arange(7, dtype=np.uint8),
    np.arange(60, dtype=np.float64).reshape(5, 12),
    np.array([True, False]),
]


def test_every_rank_of_a_node_maps_the_same_memory() -> None:
    memories = run_ranks(3, lambda comm: share_tables(comm, ARRAYS))
    inodes = set()
    for memory in memories:
        assert memory is not None
        inodes.add(os.fstat(memory.fd).st_ino)
        for shared, own in zip(pickle.loads(pickle.dumps(memory)), ARRAYS, strict=True):
            np.testing.assert_array_equal(shared, own)
            assert shared.dtype == own.dtype and not shared.flags.writeable
    assert len(inodes) == 1


def test_small_tables_are_sent_as_copies() -> None:
    assert share_tables(Local(), [np.arange(10)]) is None


def test_only_a_plane_that_may_read_in_processes_keeps_the_memory(
    collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_memory, "MIN_BYTES", 1)
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.workers=1"]
    config = compose([*collection, *words, "query.holdout.fraction=0.2", "training.validate_steps=2"])

    def num_memories() -> int:
        gc.collect()
        paths = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(path).startswith("/memfd:mixtera-tables") for path in paths)

    before = num_memories()
    with DataPlane.open(config, Local()) as plane:
        assert num_memories() == before + 1
        held_out = plane.held_out()
        assert num_memories() == before + 1
        assert next(iter(held_out.batches())).step < 0
    assert open_source(config, Local(), check=False).memory.tables is None


def test_descriptors_are_closed() -> None:
    before = num_open()
    memory = share_tables(Local(), ARRAYS)
    assert memory is not None
    arrays = map_tables(memory.fd, memory.specs)
    del memory
    # The mapping outlives the descriptor.
    np.testing.assert_array_equal(arrays[0], ARRAYS[0])
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1
    del arrays
    assert num_open() <= before
