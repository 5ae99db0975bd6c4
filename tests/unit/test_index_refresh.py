"""Refreshing: changed shards are scanned, the others are reused, and runs can continue with earlier generations."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.layout import building_folder
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.read.sample_reader import SampleReader


def configured(root: Path, **more: Any) -> Config:
    properties = {"c": "c", "n": {"path": "n", "kind": "number"}}
    data = {"root": str(root / "data"), "properties": properties} | more.pop("data", {})
    return from_plain(Config, {"data": data, "index": {"path": str(root / "i.h5"), "block_rows": 8}} | more)


def write(root: Path, name: str, rows: int, values: str) -> None:
    path = root / "data" / name
    path.parent.mkdir(exist_ok=True)
    objects = [{"text": f"{name} {i}", "c": values[i % len(values)], "n": i} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, rows, values in (("b.jsonl", 20, "xz"), ("d.jsonl", 9, "y"), ("f.jsonl", 30, "zx")):
        write(tmp_path, name, rows, values)
    build_index(configured(tmp_path))
    return tmp_path


def content(index: PropertyIndex) -> dict[str, list[tuple[Any, ...]]]:
    """Return shard → (values, number, bytes) of its rows, in order."""
    tables = index.tables
    blocks = tables.blocks
    rows_of_shard: dict[str, list[tuple[Any, ...]]] = {path: [] for path in tables.shards.path}
    for b in range(len(blocks)):
        samples = index.read_block(b)
        rows = zip(samples.combo.tolist(), samples.numbers["n"].tolist(), samples.length.tolist(), strict=True)
        rows_of_shard[tables.shards.path[blocks.shard[b]]] += [
            (tables.combos.values("c", c), n, size) for c, n, size in rows
        ]
    return rows_of_shard


def rebuilt(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return the content of a new build."""
    config = configured(root, index={"path": str(root / "fresh.h5"), "block_rows": 8})
    with open_index(build_index(config).path) as index:
        return content(index)


def test_without_changes_the_file_is_not_rewritten(root: Path) -> None:
    before = (root / "i.h5").read_bytes()
    inode = (root / "i.h5").stat().st_ino
    report = refresh_index(configured(root))
    assert report.build is None and report.unchanged == 3
    assert (root / "i.h5").read_bytes() == before and (root / "i.h5").stat().st_ino == inode
    assert not building_folder(root / "i.h5").exists()


def test_after_any_change_the_content_is_that_of_a_new_build(root: Path) -> None:
    write(root, "a.jsonl", 11, "wz")
    write(root, "d.jsonl", 12, "yv")
    (root / "data" / "f.jsonl").unlink()
    report = refresh_index(configured(root))
    assert (report.added, report.changed, report.deleted, report.unchanged) == (
        ("a.jsonl",),
        ("d.jsonl",),
        ("f.jsonl",),
        1,
    )
    with open_index(root / "i.h5") as index:
        assert content(index) == rebuilt(root)
        assert index.tables.shards.path == ("b.jsonl", "a.jsonl", "d.jsonl"), (
            "unchanged shards first, then the others, sorted"
        )
        assert index.tables.properties["c"].values == ("v", "w", "x", "y", "z")


def test_values_of_deleted_shards_leave_the_dictionary(root: Path) -> None:
    (root / "data" / "d.jsonl").unlink()
    refresh_index(configured(root))
    with open_index(root / "i.h5") as index:
        assert index.tables.properties["c"].values == ("x", "z")
        assert index.tables.combos.num_combos == 2


def test_unchanged_shards_are_not_opened(root: Path) -> None:
    status = (root / "data" / "b.jsonl").stat()
    (root / "data" / "b.jsonl").write_bytes(b"!" * status.st_size)
    os.utime(root / "data" / "b.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    write(root, "g.jsonl", 3, "x")
    report = refresh_index(configured(root))
    assert report.build is not None and report.build.bytes_read == (root / "data" / "g.jsonl").stat().st_size


def test_after_additions_an_earlier_generation_reads_as_before(root: Path) -> None:
    with open_index(root / "i.h5") as index:
        old = content(index)
        fingerprint = index.fingerprint
        tables = index.tables
    write(root, "a.jsonl", 40, "aq")
    refresh_index(configured(root))
    write(root, "c.jsonl", 40, "mn")
    report = refresh_index(configured(root))
    assert report.generations[0] == fingerprint and len(report.generations) == 2
    with open_index(root / "i.h5", None, fingerprint[:12]) as index:
        assert index.fingerprint == fingerprint
        assert content(index) == old
        assert index.tables.properties == tables.properties
        assert repr(index.tables) == repr(tables), "every table, number by number"


def test_a_reader_continues_while_shards_are_added(root: Path) -> None:
    with open_index(root / "i.h5") as index:
        reader = SampleReader(index.path, index.fingerprint)
        first = index.tables.blocks.first_sample
        expected = index.read_block(1).length.tolist()
    write(root, "a.jsonl", 40, "aq")
    refresh_index(configured(root))
    assert reader.read(int(first[1]), 8).length.tolist() == expected


def test_a_reader_is_refused_after_its_shards_were_deleted(root: Path) -> None:
    with open_index(root / "i.h5") as index:
        reader = SampleReader(index.path, index.fingerprint)
        fingerprint = index.fingerprint
    (root / "data" / "b.jsonl").unlink()
    assert refresh_index(configured(root)).generations == ()
    with pytest.raises(PropertyIndexError, match="is no longer the index that this run began with"):
        reader.read(0, 8)
    with pytest.raises(PropertyIndexError, match=r"has no generation '\w{12}'; it has \w{12}\.\n"):
        open_index(root / "i.h5", None, fingerprint)


def test_deleting_a_later_shard_keeps_earlier_generations(root: Path) -> None:
    write(root, "x.jsonl", 5, "x")
    first = refresh_index(configured(root)).generations[0]
    (root / "data" / "x.jsonl").unlink()
    assert refresh_index(configured(root)).generations == (first,)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": {"properties": {"c": "c"}}}, r"data\.properties\.n: number path:n in the index, None now"),
        ({"data": {"text": "title"}}, r"data\.text: text in the index, title now"),
    ],
)
def test_other_settings_are_refused(more: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(PropertyIndexError, match=message):
        refresh_index(configured(root, **more))


def test_bad_samples_of_unchanged_shards_stay_recorded(root: Path) -> None:
    (root / "data" / "e.jsonl").write_text('{"text": "fine"}\n{"no": 1}\n')
    skip = configured(root, data={"on_bad_sample": "skip"})
    refresh_index(skip)
    write(root, "z.jsonl", 4, "x")
    (root / "data" / "b.jsonl").unlink()
    refresh_index(skip)
    with open_index(root / "i.h5") as index:
        (bad,) = index.bad
        assert index.tables.shards.path[bad.shard] == "e.jsonl" and bad.rows == 1
        assert index.tables.num_samples == index.tables.histogram.rows.sum()


def test_logs_of_another_job_are_not_used(root: Path) -> None:
    write(root, "g.jsonl", 3, "x")
    refresh_index(configured(root))
    folder = building_folder(root / "i.h5")
    folder.mkdir()
    (folder / "key").write_text("another")
    (folder / "001-00000-000.scanlog").write_bytes(b"junk")
    write(root, "h.jsonl", 3, "x")
    report = refresh_index(configured(root))
    assert report.build is not None and report.build.resumed_units == 0
    shutil.rmtree(folder, ignore_errors=True)


def test_added_shards_have_zones(root: Path) -> None:
    write(root, "g.jsonl", 16, "x")
    refresh_index(configured(root))
    with open_index(root / "i.h5") as index:
        assert np.array_equal(index.tables.blocks.zones["n"].low[-2:], [0, 8])
