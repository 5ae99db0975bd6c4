"""Building an index: what is stored, what is refused, and how large the file is."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.formats.base import ScanUnit
from mixtera_hpc.formats.readers.jsonl import JsonlFormat
from mixtera_hpc.index.build.build import build_index, scan_settings
from mixtera_hpc.index.build.discover import discover_shards
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.index.scan.parallel_scan import ScanProgress
from mixtera_hpc.index.scan.unit_scan import scan_unit
from mixtera_hpc.tokens.bpe_training import train_bpe

PROPERTIES = {"source": "meta.source", "quality": {"path": "meta.quality", "kind": "number"}}


def configured(root: Path, **more: Any) -> Config:
    data = {"root": str(root), "properties": PROPERTIES} | more.pop("data", {})
    index = {"path": str(root / "index.h5")} | more.pop("index", {})
    return from_plain(Config, {"data": data, "index": index} | more)


def write(path: Path, rows: int, source: str = "C4") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = [{"source": source, "quality": i / rows} for i in range(rows)]
    lines = [json.dumps({"text": f"text {i}", "title": "same", "meta": meta[i]}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")


def test_rows_become_blocks_of_the_configured_size_per_shard(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 10)
    write(tmp_path / "b.jsonl", 4)
    report = build_index(configured(tmp_path, index={"block_rows": 4}))
    with open_index(report.path) as index:
        blocks = index.tables.blocks
        assert blocks.rows.tolist() == [4, 4, 2, 4]
        assert blocks.shard.tolist() == [0, 0, 0, 1]
        assert blocks.first_row.tolist() == [0, 4, 8, 0]
        assert blocks.offset[0] == 0 and blocks.length[:3].sum() == (tmp_path / "a.jsonl").stat().st_size
        assert [index.read_block(b).length.sum() for b in range(4)] == blocks.length.tolist()
    assert (report.shards, report.samples, report.blocks, report.tokens) == (2, 14, 4, None)


def test_interleaved_domains_need_no_more_blocks_than_one_domain(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "t", "meta": {"source": f"s{i % 50}"}}) for i in range(5000)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert build_index(configured(tmp_path)).blocks == 20


def test_a_category_with_a_different_value_per_sample_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtera_hpc.index.build.merge.MAX_COMBOS", 100)
    write(tmp_path / "a.jsonl", 100)
    properties = {"name": "meta.quality"}
    assert build_index(configured(tmp_path, data={"properties": properties})).combos == 100
    write(tmp_path / "a.jsonl", 101)
    with pytest.raises(ConfigError, match=r"more than 100 combinations of values, name alone has 101 or more"):
        build_index(configured(tmp_path, data={"properties": properties}))


def test_without_a_tokenizer_tokens_are_not_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    with open_index(build_index(configured(tmp_path)).path) as index:
        assert not index.tables.has_tokens and index.tokenizer_fingerprint is None
        assert index.read_block(0).tokens.tolist() == [0, 0, 0]


def test_the_configured_tokenizer_counts_the_tokens(tmp_path: Path) -> None:
    tokenizer = train_bpe(["text 1 text 2"] * 9, 262, tmp_path / "tokenizer.json")
    write(tmp_path / "a.jsonl", 3)
    with open_index(build_index(configured(tmp_path, dataplane={"tokenizer": str(tokenizer)})).path) as index:
        assert index.tables.has_tokens and index.tokenizer_fingerprint is not None
        assert (index.read_block(0).tokens > 0).all()


def test_a_property_that_no_sample_has_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    wrong = {"sauce": "meta.sauce", "size": {"path": "size", "kind": "number"}, "source": "meta.source"}
    assert build_index(configured(tmp_path, data={"properties": wrong})).empty_properties == ("sauce", "size")


def test_without_properties_all_samples_have_one_combo(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    with open_index(build_index(configured(tmp_path, data={"properties": {}})).path) as index:
        assert index.tables.combos.num_combos == 1 and index.tables.properties == {}
        assert index.read_block(0).combo.tolist() == [0, 0, 0]


def test_shards_without_rows_are_listed_without_blocks(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", 3)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "c.jsonl").write_text("\n\n \n")
    with open_index(build_index(configured(tmp_path)).path) as index:
        assert index.tables.shards.path == ("a.jsonl", "b.jsonl", "c.jsonl")
        assert index.tables.shards.rows.tolist() == [0, 3, 0]
        assert index.tables.blocks.shard.tolist() == [1]


def test_data_without_any_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"1 shards below .* hold no rows"):
        build_index(configured(tmp_path))


def test_bad_rows_end_the_build_and_leave_no_index(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"no": "text"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl has 1 unreadable row") as caught:
        build_index(configured(tmp_path))
    assert "row=1: " in caught.value.__notes__[0]
    assert not (tmp_path / "index.h5").exists()


def test_the_fingerprint_depends_on_the_content_only(tmp_path: Path) -> None:
    def fingerprint(folder: str, source: str = "C4", rows: int = 5, **more: Any) -> str:
        write(tmp_path / folder / "a.jsonl", rows, source)
        return build_index(configured(tmp_path / folder, **more)).fingerprint

    first = fingerprint("one")
    assert fingerprint("one") == first, "another modification time"
    assert fingerprint("two") == first, "another data root"
    assert fingerprint("two", index={"path": str(tmp_path / "elsewhere" / "i.h5")}) == first, "another index.path"
    others = [
        fingerprint("two", source="C5"),
        fingerprint("two", rows=6),
        fingerprint("two", index={"block_rows": 2}),
        fingerprint("two", data={"properties": {"source": "meta.source"}}),
        fingerprint("two", data={"text": "title"}),
    ]
    assert len({first, *others}) == 6


def test_the_file_contains_no_timestamps(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    timestamped = []

    def look(name: str, node: Any) -> None:
        if node.id.get_create_plist().get_obj_track_times():
            timestamped.append(name)

    with h5py.File(build_index(configured(tmp_path)).path) as file:
        file.visititems(look)
        look("/", file["/"])
    assert timestamped == []


def test_progress_sums_to_the_whole(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", 10)
    reports: list[ScanProgress] = []
    report = build_index(configured(tmp_path), progress=reports.append)
    assert [p.rows for p in reports] == [10, 20, 30]
    assert reports[-1].bytes_done == reports[-1].bytes_total == report.bytes_read


def test_an_index_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    (tmp_path / "file").touch()
    with pytest.raises(PropertyIndexError, match=r"cannot be written to (.|\n)*Set index\.path"):
        build_index(configured(tmp_path, index={"path": str(tmp_path / "file" / "index.h5")}))


SMALL_DISK = """
import resource, sys
from mixtera_hpc.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("file_bytes", [10, 9000])
def test_a_full_disk_is_reported_and_scan_results_are_kept(file_bytes: int, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 100)
    words = ["index", "build", f"data.root={tmp_path}", f"index.path={tmp_path}/index.h5", "index.block_rows=10"]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(file_bytes), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"PropertyIndexError: The index cannot be written to {tmp_path}: File too large.")
    assert not (tmp_path / "index.h5").exists()
    report = build_index(configured(tmp_path, data={"properties": {}}, index={"block_rows": 10}))
    assert report.resumed_units == (file_bytes > 10)


def test_only_an_index_may_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    content = (tmp_path / "a.jsonl").read_bytes()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = [1, 2, 3]
    (tmp_path / "folder.h5").mkdir()
    for name, what in (("a.jsonl", "no property index"), ("other.h5", "no property index"), ("folder.h5", "a folder")):
        with pytest.raises(PropertyIndexError, match=rf"{name}, which is {what} and would be replaced"):
            build_index(configured(tmp_path, index={"path": str(tmp_path / name)}))
    assert (tmp_path / "a.jsonl").read_bytes() == content
    (tmp_path / "index.h5").write_bytes(b"")
    path = Path(build_index(configured(tmp_path)).path)
    path.write_bytes(path.read_bytes()[:-100])
    assert build_index(configured(tmp_path)).samples == 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_contradicting_paths_are_refused_in_every_format(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", 3)
    with pytest.raises(ConfigError, match=r"data\.properties\.x looks inside 'text'"):
        build_index(configured(tmp_path, data={"properties": {"x": "text.language"}}))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    with pytest.raises(ConfigError, match=r"dataplane\.tokenizer is .*no\.json"):
        build_index(configured(tmp_path, dataplane={"tokenizer": str(tmp_path / "no.json")}))


def test_an_index_takes_less_than_eight_bytes_per_sample(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(1))
    lengths = rng.lognormal(6.5, 0.7, 100_000).astype(int)
    sources = rng.integers(0, 7, 100_000)
    with (tmp_path / "a.jsonl").open("w") as file:
        for length, source in zip(lengths.tolist(), sources.tolist(), strict=True):
            file.write(json.dumps({"text": "ab " * (length // 30), "meta": {"source": f"s{source}"}}) + "\n")
    tokenizer = train_bpe(["ab ab ab"], 260, tmp_path / "tokenizer.json")
    config = configured(
        tmp_path, data={"properties": {"source": "meta.source"}}, dataplane={"tokenizer": str(tokenizer)}
    )
    report = build_index(config)
    assert report.index_bytes / report.samples < 8


@pytest.mark.parametrize("result_rows", [1, 7, 1000])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_long_unit_yields_several_results_with_the_same_content(
    result_rows: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results end where blocks end; rows of the open block are in the next result."""
    path = tmp_path / f"a.{suffix}"
    write(path, 100)
    rows = path.read_bytes().splitlines(keepends=True)
    rows[33] = b"{bad\n"
    chunks = [b"".join(rows[i : i + 9]) for i in range(0, 100, 9)]
    path.write_bytes(b"".join(map(gzip.compress, chunks) if suffix.endswith("gz") else chunks))
    config = configured(tmp_path, data={"on_bad_sample": "skip"}, index={"block_rows": 3})
    whole = build_index(config)
    with open_index(whole.path) as index:
        blocks = index.tables.blocks.rows.tolist()
    monkeypatch.setattr("mixtera_hpc.index.scan.unit_scan.RESULT_ROWS", result_rows)
    monkeypatch.setattr("mixtera_hpc.formats.codecs.frames.SEGMENT_BYTES", 256)
    if suffix == "jsonl":
        monkeypatch.setattr("mixtera_hpc.formats.shard_scan.load_format", lambda name: JsonlFormat(segment_bytes=256))
    results = list(scan_unit(*_only_unit(config)))
    assert len(results) > 5 or result_rows == 1000
    assert [n for result in results for n in result.blocks["rows"].tolist()] == blocks
    assert all(result.num_rows == result.blocks["rows"].sum() for result in results)
    assert build_index(config).fingerprint == whole.fingerprint


def _only_unit(config: Config) -> tuple[Any, Any, ScanUnit]:
    (shard,) = discover_shards(config.data)
    return scan_settings(config), shard, ScanUnit(0, shard.size_bytes)
