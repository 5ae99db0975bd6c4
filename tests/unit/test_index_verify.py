"""Stale indexes are detected and refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.read.verify import changed_shards, check_fresh, deeply_changed_shards
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_tokenizer


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


def test_unchanged_shards_have_no_problems(index: PropertyIndex) -> None:
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


def test_a_time_that_was_cut_to_whole_seconds_is_no_change(index: PropertyIndex) -> None:
    path = index.data_root / "5.jsonl"
    seconds = path.stat().st_mtime_ns // 10**9 * 10**9
    os.utime(path, ns=(seconds, seconds))
    check_fresh(index)
    for other in (seconds - 1, seconds - 10**9, seconds + 10**9):
        os.utime(path, ns=(other, other))
        assert problems(index) == {"5.jsonl": "changed since, same size"}


def test_the_deep_check_lists_the_shards_a_fixed_number_of_times(
    index: PropertyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list for each of 100,000 shards would take hours."""
    calls: list[str] = []
    for name in ("shard_paths", "shard_texts"):
        method = getattr(PropertyIndex, name)

        def listed(self: PropertyIndex, method: Callable[[PropertyIndex], Any] = method) -> Any:
            calls.append(method.__name__)
            return method(self)

        monkeypatch.setattr(PropertyIndex, name, listed)
    assert deeply_changed_shards(index, None, Local()) == []
    assert len(calls) < len(index.tables.shards.path)


def test_only_the_first_few_changed_shards_are_named(index: PropertyIndex) -> None:
    shutil.rmtree(index.data_root)
    with pytest.raises(PropertyIndexError) as caught:
        check_fresh(index)
    assert "4.jsonl" in str(caught.value) and "5.jsonl" not in str(caught.value) and "and 3 more" in str(caught.value)


def test_a_new_file_does_not_make_an_index_stale(index: PropertyIndex) -> None:
    (index.data_root / "9.jsonl").write_text('{"text": "new"}\n')
    check_fresh(index)


def test_shards_are_checked_below_the_given_data_root(index: PropertyIndex, tmp_path: Path) -> None:
    shutil.copytree(index.data_root, tmp_path / "moved")
    shutil.rmtree(index.data_root)
    assert len(changed_shards(index)) == 8
    assert changed_shards(open_index(index.path, str(tmp_path / "moved"))) == []


class TestDeep:
    """`verify --deep`: changes of content that keep size and modification time."""

    @pytest.fixture
    def deep(self, tmp_path: Path) -> PropertyIndex:
        """Return an index with a shard of 4 MB, whose middle is not part of the fingerprint."""
        (tmp_path / "data").mkdir()
        rows = [json.dumps({"text": f"row {i} " + "many words " * 400}) for i in range(1000)]
        (tmp_path / "data" / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / "data" / "empty.jsonl").touch()
        tokenizer = train_bpe(["many words row 1 2 3"] * 9, 270, tmp_path / "tokenizer.json")
        config = {
            "data": {"root": str(tmp_path / "data")},
            "index": {"path": str(tmp_path / "i.h5"), "block_rows": 250},
        }
        build_index(from_plain(Config, config | {"dataplane": {"tokenizer": str(tokenizer)}}))
        return open_index(tmp_path / "i.h5")

    def damage(self, index: PropertyIndex, old: bytes, new: bytes) -> None:
        """Replace bytes in the middle of the shard by others of the same length, and restore the times."""
        path = index.data_root / "a.jsonl"
        status = path.stat()
        content = path.read_bytes()
        place = content.index(old, len(content) // 2)
        path.write_bytes(content[:place] + new + content[place + len(old) :])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def problems(self, index: PropertyIndex) -> list[str]:
        tokenizer = load_tokenizer(index.path.with_name("tokenizer.json"))
        return [shard.problem for shard in deeply_changed_shards(index, tokenizer, Local())]

    def test_an_unchanged_shard_has_no_problem(self, deep: PropertyIndex) -> None:
        assert self.problems(deep) == []

    def test_a_broken_row_is_detected(self, deep: PropertyIndex) -> None:
        self.damage(deep, b'{"text"', b'{"text;')
        assert changed_shards(deep) == []
        (problem,) = self.problems(deep)
        assert problem.startswith("it has changed since it was indexed")

    def test_another_text_of_the_same_length_is_detected_by_its_tokens(self, deep: PropertyIndex) -> None:
        self.damage(deep, b"many words", b"mzny wqrds")
        (problem,) = self.problems(deep)
        assert re.fullmatch(r"row \d+ has \d+ tokens, indexed with \d+", problem)

    def test_a_missing_shard_is_named(self, deep: PropertyIndex) -> None:
        (deep.data_root / "a.jsonl").unlink()
        assert self.problems(deep) == ["missing"]

    def test_shards_without_text_are_decoded(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        write_megatron(tmp_path / "data" / "a.bin", [[1, 2], [3]])
        (tmp_path / "data" / "b.jsonl").write_text('{"text": 1}\n' * 3)
        plain = {"data": {"root": str(tmp_path / "data"), "text": None}, "index": {"path": str(tmp_path / "i.h5")}}
        build_index(from_plain(Config, plain))
        index = open_index(tmp_path / "i.h5")
        assert deeply_changed_shards(index, None, Local()) == []
        (tmp_path / "data" / "a.idx").unlink()
        (problem,) = deeply_changed_shards(index, None, Local())
        assert (problem.path, problem.problem[:26]) == ("a.bin", "it needs a.idx beside it, ")
