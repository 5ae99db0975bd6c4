"""Sequences that hold many epochs of a small domain: the same documents as epoch by epoch, in far fewer steps."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.lanes import ServedPart
from mixtera_hpc.core.repeats.epoch_rows import epoch_rows
from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams
from mixtera_hpc.dataplane.reading.lookup import repeated_epochs
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index

COLUMNS = ("block", "row", "first", "last", "size", "offset", "length")


@pytest.fixture(params=["none", "block", "window", "sequence"])
def source(request: pytest.FixtureRequest, collection: list[str], tmp_path: Path) -> Source:
    """Return domains of 1, 3 and 200 documents over blocks of 16 rows."""
    domains = ["one", *["three"] * 3, *["many"] * 200]
    rows = [{"text": f"{name} {i}", "domain": name, "keep": str(i % 2)} for i, name in enumerate(sorted(domains * 1))]
    rows = rows[50:] + rows[:50]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in collection if word.startswith("dataplane.tokenizer=")]
    words += [f"data.root={tmp_path}", "data.properties.domain=domain", "data.properties.keep=keep"]
    config = compose([*words, "index.block_rows=16", "mixture.group_by=[domain]", f"dataplane.shuffle={request.param}"])
    build_index(config)
    return open_source(config, Local())


def spans(source: Source) -> list[Any]:
    """Return domains, starts and stops of spans that hold up to 100 epochs."""
    items = source.layout.epoch_items()
    rng = np.random.default_rng(0)
    domain = rng.integers(0, len(items), 12)
    starts = rng.integers(0, 10**6, 12)
    lengths = rng.integers(1, 300, 12)
    lengths[:3] = 100 * items[domain[:3]].min()
    return [domain, starts, starts + lengths]


def epoch_by_epoch(source: Source, monkeypatch: pytest.MonkeyPatch) -> DomainStreams:
    monkeypatch.setattr(repeated_epochs, "MAX_EPOCH_ITEMS", 0)
    streams = source.streams()
    monkeypatch.undo()
    return streams


def assert_same(one: Documents, other: Documents) -> None:
    for name in COLUMNS:
        assert (getattr(one, name) == getattr(other, name)).all(), name


def test_documents_are_those_of_every_epoch(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch_by_epoch(source, monkeypatch)
    streams = source.streams()
    for _ in range(2):
        assert_same(streams.documents_of_spans(*spans(source)), expected.documents_of_spans(*spans(source)))


def test_a_damaged_domain_is_refused_every_time(source: Source) -> None:
    """A read that fails is repeated step by step."""
    read = source.samples.make_block_reader()

    def wrong(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        columns = read(blocks, only_sizes=only_sizes)
        return replace(columns, tokens=columns.tokens + 1)

    streams = DomainStreams(source.layout, wrong, source.samples.domain_of)
    domain = source.layout.epoch_items().argmin()
    span = np.array([domain]), np.array([0]), 3 * source.layout.epoch_items()[[domain]]
    for _ in range(2):
        with pytest.raises(DataError, match="the index file is damaged"):
            streams.documents_of_spans(*span)


def test_dropped_samples_are_left_out(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = open_source(source.config, Local(), subset=SampleSubset(drop=("keep == '1'",)))
    assert_same(
        dropped.streams().documents_of_spans(*spans(dropped)),
        epoch_by_epoch(dropped, monkeypatch).documents_of_spans(*spans(dropped)),
    )


def test_groups_of_many_dropped_samples_are_ordered_in_parts(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = open_source(source.config, Local(), subset=SampleSubset(drop=("keep == '1'",)))
    whole = dropped.streams().documents_of_spans(*spans(dropped))
    sizes = []

    def ordered(*arguments: Any) -> Any:
        rows = epoch_rows(*arguments)
        sizes.append(rows.size)
        return rows

    monkeypatch.setattr(repeated_epochs, "SAMPLES_AT_ONCE", 500)
    monkeypatch.setattr(repeated_epochs, "epoch_rows", ordered)
    assert_same(dropped.streams().documents_of_spans(*spans(dropped)), whole)
    assert len(sizes) > 1
    assert max(sizes) <= 500


def test_an_epoch_that_was_cut_anew_keeps_its_order(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    items = source.layout.epoch_items()
    part = ServedPart(epoch=5, ranges=((1, 3),))
    small = int(np.argmin(np.where(items > 3, items, 10**6)))
    edited = source.at_version(replace(source.stream_version, served={small: part}))
    bounds = [np.array([small] * 3), np.array([0, 5, 9]) * items[small] + 1, np.array([4, 8, 90]) * items[small] + 2]
    assert_same(
        edited.streams().documents_of_spans(*bounds),
        epoch_by_epoch(edited, monkeypatch).documents_of_spans(*bounds),
    )


def test_thousands_of_epochs_take_few_calls(source: Source) -> None:
    small = int(np.argmin(source.layout.epoch_items()))
    length = 10_000 * int(source.layout.epoch_items()[small])
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    streams = source.streams()
    sys.setprofile(count)
    try:
        documents = streams.documents(small, 7, 7 + length)
    finally:
        sys.setprofile(None)
    assert len(documents.block) >= 10_000
    assert calls < 10_000


def test_spans_looked_up_together_keep_their_order(source: Source) -> None:
    streams = source.streams()
    together = streams.documents_of_spans(*spans(source))
    alone = [
        streams.documents_of_spans(*parts) for parts in zip(*(np.split(v, 12) for v in spans(source)), strict=True)
    ]
    for name in COLUMNS:
        assert (getattr(together, name) == np.concatenate([getattr(one, name) for one in alone])).all(), name
