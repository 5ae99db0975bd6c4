"""A lookup of many spans of a stream returns the same as one lookup per span, across windows and epochs."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.lookup import item_directory
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import DataError

from .examples import whole_runs

SHUFFLES = ["dataplane.shuffle=none", "dataplane.shuffle=block", "dataplane.window_bytes=20000"]


@pytest.fixture(scope="module", params=SHUFFLES)
def source(collection: list[str], request: pytest.FixtureRequest) -> Source:
    return open_source(compose([*collection, request.param]), Local())


def items_of(documents: Documents) -> np.ndarray:
    """Return block, row and position in the document of every item; shape (items, 3)."""
    count = documents.last - documents.first
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    places = (documents.block, documents.row, documents.first)
    block, row, first = (np.repeat(values, count).astype(np.int64) for values in places)
    return np.stack([block, row, first + inside], axis=1)


@whole_runs(60)
@given(
    st.integers(0, 9),
    st.lists(st.tuples(st.floats(0, 2.5), st.integers(1, 700)), min_size=1, max_size=6),
    st.sampled_from([1, 1 << 14]),
)
def test_many_spans_at_once_equal_one_span_at_a_time(
    source: Source, domain: int, wanted: list[tuple[float, int]], min_directory: int
) -> None:
    streams = source.streams()
    epoch = int(source.layout.epoch_items()[domain])
    spans = [(int(start * epoch), int(start * epoch) + count) for start, count in wanted]
    whole = items_of(streams.documents(domain, 0, max(stop for _, stop in spans)))
    starts, stops = np.array(spans).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_directory, "MIN_DOCUMENTS", min_directory)
        documents = source.streams().documents_of(domain, starts, stops)
    assert np.array_equal(items_of(documents), np.concatenate([whole[a:b] for a, b in spans]))
    assert (documents.first < documents.last).all() and (documents.last <= documents.size).all()


def test_a_changed_document_is_reported_at_its_step(own_collection: list[str]) -> None:
    """Several steps are read together, but the steps before the damage are served."""
    settings = [
        "mixture.group_by=[]",
        "dataplane.shuffle=none",
        "dataplane.seq_len=32",
        "dataplane.global_batch_size=4",
    ]
    # Without the comparison with the index, so that the tokens of the document are what is noticed.
    config = compose([*own_collection, *settings, "dataplane.chunk_steps=1000"])
    source = open_source(config, Local(), check=False)
    shard = Path(source.config.data.root) / source.index.shard_paths[0]
    lines = shard.read_bytes().splitlines(keepends=True)
    text = json.dumps(json.loads(lines[100])["text"]).encode()
    lines[100] = lines[100].replace(text, b'"' + b"z" * (len(text) - 2) + b'"')
    shard.write_bytes(b"".join(lines))
    documents = source.streams().documents(0, 0, int(source.layout.epoch_items()[0]))
    begins = int(documents.size[:100].sum())
    plan, _ = source.planner.plan(PlannerState.start(1), source.weights)
    served: list[Batch] = []
    maker = BatchMaker(source, BatchSlice(), audit=False)
    with closing(maker), pytest.raises(DataError, match=r"row 100 has \d+ tokens, but the index counted"):
        for batch in maker.batches(plan, 0):
            served.append(batch)
    assert len(served) == (begins - 1) // (4 * source.grid.stride)
