"""`data.on_bad_sample=skip`: rows that cannot be read are skipped and counted; all others keep their positions."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domains import select
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import BlockRef, ScanUnit
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.build import build_index, scan_settings
from mixtera_hpc.index.build.discover import discover_shards
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.layout import BadRows
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.scan.unit_scan import scan_unit
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.bpe_training import train_bpe

PROPERTIES = {"source": "source", "quality": {"path": "quality", "kind": "number"}}
BAD = {
    1: (b'{"text": "cut"', "Input data was truncated"),
    2: (b'{"source": "a"}', "Object missing required field `text`"),
    6: (b'{"text": 7}', "Expected `str`, got `int` - at `$.text`"),
    7: (b'{"text": "\xff"}', "'utf-8' codec can't decode byte: invalid start byte"),
    8: (b"\0\0\0\0\0\0\0\0", "JSON is malformed: invalid character"),
}


def configured(root: Path, **more: Any) -> Config:
    data = {"root": str(root), "properties": PROPERTIES, "on_bad_sample": "skip"} | more.pop("data", {})
    return from_plain(Config, {"data": data, "index": {"path": str(root / "index.h5"), "block_rows": 4}} | more)


def lines(count: int) -> list[bytes]:
    rows = [{"text": f"text {i}", "source": "ab"[i % 2], "quality": i / 10} for i in range(count)]
    return [BAD[i][0] if i in BAD else json.dumps(row).encode() for i, row in enumerate(rows)]


def plain(path: Path, rows: list[bytes]) -> None:
    (path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")


def compressed(path: Path, rows: list[bytes]) -> None:
    frames = [gzip.compress(b"\n".join(rows[i : i + 5]) + b"\n") for i in range(0, len(rows), 5)]
    (path / "a.jsonl.gz").write_bytes(b"".join(frames))


@pytest.fixture(params=[plain, compressed], ids=["jsonl", "jsonl.gz"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> PropertyIndex:
    request.param(tmp_path, lines(23))
    tokenizer = train_bpe(["text 1 2 3"] * 9, 262, tmp_path / "tokenizer.json")
    build_index(configured(tmp_path, dataplane={"tokenizer": str(tokenizer)}))
    return open_index(tmp_path / "index.h5")


def readable(index: PropertyIndex) -> list[str]:
    """Read the documents of all rows that a query may select."""
    blocks = index.tables.blocks
    texts: list[str] = []
    shards = index.tables.shards
    reader = load_format(shards.format[0]).open(index.data_root / shards.path[0], index.text, BlockCache())
    for b in range(len(blocks)):
        place = BlockRef.of(blocks, b)
        samples = index.read_block(b)
        rows = np.flatnonzero(samples.combo != index.tables.combos.bad)
        texts += reader.documents(place, samples.length, rows)
    reader.close()
    return texts


def test_only_readable_rows_are_counted_as_scanned(index: PropertyIndex) -> None:
    effort = select(
        index.tables, parse_predicate("quality >= 0.2", index.tables.properties), [{}], index.read_blocks
    ).pruning
    assert effort.scanned_blocks == 1
    assert effort.scanned_samples == np.count_nonzero(index.read_block(0).combo != index.tables.combos.bad) > 0


def test_all_other_rows_can_be_read(index: PropertyIndex) -> None:
    good = [f"text {i}" for i in range(23) if i not in BAD]
    assert readable(index) == good
    assert index.tables.num_samples == len(good)
    assert index.tables.shards.rows.tolist() == [23], "positions in the file count every row"


def test_bad_rows_are_counted_per_shard_and_reason(index: PropertyIndex) -> None:
    expected = [BadRows(shard=0, reason=reason, rows=1) for _, reason in BAD.values()]
    assert sorted(index.bad, key=str) == sorted(expected, key=str)


def test_no_query_selects_bad_rows_not_even_one_for_null(index: PropertyIndex) -> None:
    for where in (None, "source is None", "quality is None", "not source == 'a'", "quality < 0.65 or quality is None"):
        chosen = select(index.tables, parse_predicate(where, index.tables.properties), [{}], index.read_blocks)
        rows, tokens = chosen.table.totals()
        listed = [
            row
            for b in range(len(index.tables.blocks))
            for row in chosen.domain_of(index.tables.combos, index.read_block(b)).tolist()
        ]
        expected = {
            None: 18,
            "source is None": 0,
            "quality is None": 0,
            "not source == 'a'": sum(i % 2 == 1 for i in range(23) if i not in BAD),
            "quality < 0.65 or quality is None": sum(i < 6.5 for i in range(23) if i not in BAD),
        }[where]
        assert rows.tolist() == [expected] and listed.count(0) == expected, where
        assert (tokens[0] > 0) == (expected > 0)


def test_blocks_of_only_bad_rows_have_an_empty_histogram(tmp_path: Path) -> None:
    plain(tmp_path, [*lines(1), *[b"{"] * 8, *lines(1)])
    build_index(configured(tmp_path))
    with open_index(tmp_path / "index.h5") as index:
        assert np.diff(index.tables.histogram.indptr).tolist() == [1, 0, 1]
        assert readable(index) == ["text 0", "text 0"]


def test_null_text_in_parquet_is_a_bad_sample(tmp_path: Path) -> None:
    rows = [{"text": None if i in (0, 5) else f"text {i}", "source": "a", "quality": 0.5} for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    report = build_index(configured(tmp_path))
    assert (report.samples, report.bad_rows) == (7, 2)
    with open_index(tmp_path / "index.h5") as index:
        assert readable(index) == [f"text {i}" for i in range(9) if i not in (0, 5)]


def cut_gzip(root: Path) -> int:
    """Write frames of 5 rows each, the last one truncated; return the number of rows before it."""
    compressed(root, [json.dumps({"text": f"text {i}"}).encode() for i in range(20)])
    content = (root / "a.jsonl.gz").read_bytes()
    (root / "a.jsonl.gz").write_bytes(content[:-12])
    return 15


def cut_parquet(root: Path) -> int:
    pq.write_table(pa.Table.from_pylist([{"text": "x"}] * 100), root / "a.parquet")
    (root / "a.parquet").write_bytes((root / "a.parquet").read_bytes()[:-20])
    return 0


@pytest.mark.parametrize("damage", [cut_gzip, cut_parquet])
def test_the_damaged_end_of_a_shard_is_skipped(damage: Callable[[Path], int], tmp_path: Path) -> None:
    rows = damage(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "whole"}')
    with pytest.raises(DataError):
        build_index(configured(tmp_path, data={"on_bad_sample": "fail"}))
    report = build_index(configured(tmp_path))
    assert (report.samples, report.damaged_shards) == (rows + 1, 1)
    with open_index(tmp_path / "index.h5") as index:
        (bad,) = index.bad
        assert (bad.shard, bad.rows) == (0, 0) and bad.reason.startswith("damaged: the shard ")


def test_data_of_only_bad_rows_is_refused_with_the_reasons(tmp_path: Path) -> None:
    plain(tmp_path, [b"{", b"{"])
    with pytest.raises(DataError, match=r"hold no rows that can be read:\n +a\.jsonl: 2, Input data was truncated\n"):
        build_index(configured(tmp_path))


def test_a_missing_file_is_not_skipped(tmp_path: Path) -> None:
    """A file system may be unavailable for a minute; that must not drop a shard for good."""
    plain(tmp_path, lines(1))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    config = configured(tmp_path)
    shards = discover_shards(config.data)
    scan = scan_settings(config)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file"):
        list(scan_unit(scan, shards[1], ScanUnit(0, shards[1].size_bytes)))


def test_a_file_that_cannot_be_opened_is_not_skipped(tmp_path: Path) -> None:
    plain(tmp_path, lines(1))
    write_megatron(tmp_path / "b.bin", [[1, 2], [3]])
    (tmp_path / "b.idx").unlink()
    with pytest.raises(DataError, match=r"b\.bin needs b\.idx beside it"):
        build_index(configured(tmp_path))
    (tmp_path / "b.idx").write_bytes(b"there, but damaged")
    assert build_index(configured(tmp_path)).damaged_shards == 1


def test_reasons_that_differ_only_in_the_sample_are_counted_together(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("a/1.jpg", b"x"),
            ("b.2.jpg", b"x"),
            ("b3.txt", b"\xff"),
            ("c4.txt", b"\xff"),
            ("d.txt", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    build_index(configured(tmp_path, data={"text": "txt", "properties": {}}))
    with open_index(tmp_path / "index.h5") as index:
        assert sorted((bad.rows, bad.reason) for bad in index.bad) == [
            (1, "sample has no member for data.text=txt; it has 2.jpg"),
            (1, "sample has no member for data.text=txt; it has jpg"),
            (2, "member .txt: 'utf-8' codec can't decode byte: invalid start byte"),
        ]


def test_the_number_of_different_reasons_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    plain(tmp_path, [b'{"text": "%d"}' % i for i in range(100)])
    (tmp_path / "b.jsonl").write_text('{"text": "good"}')
    (tmp_path / "talkative_parser.py").write_text(
        "def parse(row):\n    if row['text'] != 'good': raise ValueError(row['text'])\n    return {}\n"
    )
    build_index(configured(tmp_path, data={"parser": "talkative_parser.parse"}))
    with open_index(tmp_path / "index.h5") as index:
        assert len(index.bad) == 31 and sum(bad.rows for bad in index.bad) == 100
        assert BadRows(shard=0, reason="other reasons", rows=70) in index.bad


def test_a_pattern_that_matches_no_number_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    plain(tmp_path, lines(1))
    properties = {"number": {"path": "source", "kind": "number", "pattern": "."}}
    with pytest.raises(ConfigError, match="Change its pattern so that it matches digits only"):
        build_index(configured(tmp_path, data={"properties": properties}))


def test_a_shard_that_changed_after_discovery_is_named(tmp_path: Path) -> None:
    plain(tmp_path, lines(9))
    config = configured(tmp_path)
    (shard,) = discover_shards(config.data)
    scan = scan_settings(config)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "late"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was being indexed"):
        list(scan_unit(scan, shard, ScanUnit(0, shard.size_bytes)))


def test_a_generation_without_bad_rows_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "whole", "source": "a"}')
    config = configured(tmp_path)
    before = build_index(config).fingerprint
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "cut"\n{"text": "x"}')
    refresh_index(config)
    with open_index(tmp_path / "index.h5", generation=before) as index:
        chosen = select(
            index.tables, parse_predicate("source == 'a'", index.tables.properties), [{}], index.read_blocks
        )
        assert index.tables.combos.bad == -1 and chosen.selected[0] == index.tables.num_samples == 1
