"""Stale indexes are found and refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build import build_index
from mixtera_hpc.index.open import PropertyIndex, open_index
from mixtera_hpc.index.verify import changed_shards, check_fresh


@pytest.fixture
def index(tmp_path: Path) -> PropertyIndex:
    root = tmp_path / "data"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.jsonl").write_text(json.dumps({"text": "x" * i}) + "\n")
    config = {"data": {"root": str(root)}, "index": {"path": str(tmp_path / "index.h5")}}
    return open_index(build_index(from_plain(Config, config)).path)


def problems(index: PropertyIndex) -> dict[str, str]:
    return {shard.path: shard.problem for shard in changed_shards(index)}


def test_nothing_changed(index: PropertyIndex) -> None:
    assert problems(index) == {}
    check_fresh(index)


def test_every_kind_of_change_is_named(index: PropertyIndex) -> None:
    root = index.data_root
    (root / "1.jsonl").unlink()
    with (root / "3.jsonl").open("a") as file:
        file.write("\n")
    os.utime(root / "5.jsonl", ns=(0, 0))
    assert problems(index) == {
        "1.jsonl": "missing",
        "3.jsonl": "17 bytes, indexed with 16",
        "5.jsonl": "changed since, same size",
    }
    with pytest.raises(
        PropertyIndexError, match=r"3 of 8 shards(.|\n)*1\.jsonl \(missing\)(.|\n)*mixtera-hpc index refresh"
    ):
        check_fresh(index)


def test_only_the_first_few_are_named(index: PropertyIndex) -> None:
    shutil.rmtree(index.data_root)
    with pytest.raises(PropertyIndexError) as caught:
        check_fresh(index)
    assert "4.jsonl" in str(caught.value) and "5.jsonl" not in str(caught.value) and "and 3 more" in str(caught.value)


def test_a_new_file_is_no_reason_to_refuse(index: PropertyIndex) -> None:
    (index.data_root / "9.jsonl").write_text('{"text": "new"}\n')
    check_fresh(index)


def test_shards_are_looked_for_where_the_data_is_now(index: PropertyIndex, tmp_path: Path) -> None:
    shutil.copytree(index.data_root, tmp_path / "moved")
    shutil.rmtree(index.data_root)
    assert len(changed_shards(index)) == 8
    assert changed_shards(index, tmp_path / "moved") == []
