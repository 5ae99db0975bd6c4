"""Data sets with unlike formats, texts, parsers and properties, in one index and in one run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import check_build
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.testing.small_collection import paragraphs
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.trace.list import planned_sequences

SLIM_PAJAMA = {"include": ["train/**/*.jsonl.zst"], "properties": {"source": "meta.redpajama_set_name"}}
STARCODER = {
    "include": ["**/*.parquet"],
    "text": "content",
    "properties": {"language": "__parent__", "stars": {"path": "max_stars_count", "kind": "number"}},
}


NUMBER = {"path": "n", "kind": "number"}


def write_slim_pajama(path: Path, texts: list[str]) -> None:
    rows = [{"text": t, "meta": {"redpajama_set_name": f"Set{i % 2}"}} for i, t in enumerate(texts)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(zstandard.compress(b"".join(lines[i : i + 20])) for i in range(0, len(lines), 20)))


def write_starcoder(path: Path, texts: list[str]) -> None:
    rows = [{"content": t, "max_stars_count": None if i % 5 == 0 else i} for i, t in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data sets `web` and `code`, a tokenizer, and an index of both and of each."""
    folder = tmp_path_factory.mktemp("unlike")
    prose = paragraphs("argparse")[:90]
    code = paragraphs("ast")[:70]
    write_slim_pajama(folder / "web/train/chunk1/example_train_0.jsonl.zst", prose)
    write_starcoder(folder / "code/python/train-0.parquet", code[:40])
    write_starcoder(folder / "code/c/train-0.parquet", code[40:])
    train_bpe(prose + code, 400, folder / "tokenizer.json")
    build_index(config_of(folder, "both", {"sets": sets_of(folder)}))
    for name, data_set in sets_of(folder).items():
        build_index(config_of(folder, name, data_set))
    return folder


def sets_of(folder: Path) -> dict[str, Any]:
    return {"web": {"root": f"{folder}/web", **SLIM_PAJAMA}, "code": {"root": f"{folder}/code", **STARCODER}}


def config_of(folder: Path, name: str, data: dict[str, Any], **more: Any) -> Config:
    plane = {"tokenizer": f"{folder}/tokenizer.json", "seq_len": 24, "global_batch_size": 6, "audit": True}
    plain: dict[str, Any] = {
        "data": data,
        "index": {"path": f"{folder}/{name}.h5"} | more.pop("index", {}),
        "mixture": {"group_by": ["dataset"]},
        "dataplane": plane,
    }
    return from_plain(Config, plain | more)


def with_digests(config: Config) -> list[dict[str, Any]]:
    """Return the sequences of six steps with digests of their tokens."""
    config = from_plain(Config, {**to_plain(config), "plan": {"digests": True}})
    return list(planned_sequences(open_source(config, Local()), 0, 6))


def values(index: PropertyIndex) -> list[tuple[str, ...]]:
    """Return the values of every categorical property, per combo."""
    combos = index.tables.combos
    names = sorted(combos.properties)
    return sorted({tuple("|".join(combos.values(n, c)) for n in names) for c in range(combos.num_combos)})


class TestOneRun:
    def test_data_sets_and_joined_indexes_serve_the_same_tokens(self, folder: Path) -> None:
        one = with_digests(config_of(folder, "both", {"sets": sets_of(folder)}))
        paths = [f"{folder}/code.h5", f"{folder}/web.h5"]
        several = with_digests(config_of(folder, "unused", {}, index={"paths": paths}))
        assert one == several and len(one) == 36
        assert len({record["digest"] for record in one}) > 20
        assert {record["domain_id"] for record in one} == {0, 1}

    def test_a_run_needs_no_settings_but_the_index(self, folder: Path) -> None:
        assert with_digests(config_of(folder, "both", {})) == with_digests(
            config_of(folder, "both", {"sets": sets_of(folder)})
        )

    def test_a_run_resumes_on_other_ranks_and_is_proven(self, folder: Path, prove_run: Callable[[Config], int]) -> None:
        assert prove_run(config_of(folder, "both", {"sets": sets_of(folder)})) == 54

    def test_query_and_verify_work_on_both(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [f"index.path={folder}/both.h5", "mixture.group_by=[dataset]"]
        assert main(["query", *words, "--json", "query.where=language == 'python' or source is not None"]) == 0
        domains = json.loads(capsys.readouterr().out)["domains"]
        assert [(d["key"], d["samples"]) for d in domains] == [({"dataset": "code"}, 40), ({"dataset": "web"}, 90)]
        assert main(["index", "verify", "--deep", *words, f"dataplane.tokenizer={folder}/tokenizer.json"]) == 0


class TestIndex:
    def test_a_property_of_another_data_set_is_null(self, folder: Path) -> None:
        with open_index(folder / "both.h5") as index:
            assert values(index) == [
                ("code", "c", ""),
                ("code", "python", ""),
                ("web", "", "Set0"),
                ("web", "", "Set1"),
            ]
            assert index.tables.blocks.zones["stars"].has_null.all()
            assert index.sets["web"].text == "text" and index.sets["code"].text == "content"

    def test_a_refresh_adds_shards_with_the_settings_of_their_set(self, folder: Path, tmp_path: Path) -> None:
        write_slim_pajama(tmp_path / "web/train/a.jsonl.zst", ["one", "two"])
        write_starcoder(tmp_path / "code/c/a.parquet", ["int x;"])
        data = {"sets": sets_of(tmp_path)}
        plane = {"tokenizer": f"{folder}/tokenizer.json"}
        config = config_of(tmp_path, "i", data, dataplane=plane)
        build_index(config)
        write_starcoder(tmp_path / "code/rust/a.parquet", ["fn main() {}", "let x"])
        assert refresh_index(config).added == ("rust/a.parquet",)
        with open_index(tmp_path / "i.h5") as index:
            assert index.tables.num_samples == 5 and ("code", "rust", "") in values(index)
        other = {"sets": {**data["sets"], "code": {**data["sets"]["code"], "text": "source"}}}
        with pytest.raises(PropertyIndexError, match=r"data\.sets\.code\.text: content in the index, source now"):
            refresh_index(config_of(tmp_path, "i", other, dataplane=plane))

    def test_a_function_of_one_data_set_leaves_the_others_null(self, folder: Path, tmp_path: Path) -> None:
        length = {"function": "mixtera_hpc.index.document_functions.length_bucket"}
        sets = sets_of(folder)
        build_index(config_of(tmp_path, "i", {"sets": sets}, dataplane={"tokenizer": f"{folder}/tokenizer.json"}))
        sets["code"] = {**sets["code"], "properties": {**sets["code"]["properties"], "size": length}}
        config = config_of(tmp_path, "i", {"sets": sets}, dataplane={"tokenizer": f"{folder}/tokenizer.json"})
        assert derive_properties(config).derived == ("size",)
        with open_index(tmp_path / "i.h5") as derived:
            content = values(derived)
            sources = derived.sources
        build_index(config)
        with open_index(tmp_path / "i.h5") as fresh:
            assert values(fresh) == content and fresh.sources == sources
        assert {row[2] for row in content if row[0] == "web"} == {""}
        assert "" not in {row[2] for row in content if row[0] == "code"}

    def test_each_data_set_has_its_own_parser(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "set_parsers.py").write_text("def shout(row): return {'kind': row['kind'].upper()}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "set_parsers", raising=False)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.jsonl").write_text('{"text": "t", "kind": "k"}\n')
        sets = {"a": {"root": f"{tmp_path}/a", "parser": "set_parsers.shout"}, "b": f"{tmp_path}/b"}
        data = {"sets": sets, "properties": {"kind": "kind"}}
        build_index(from_plain(Config, {"data": data, "index": {"path": f"{tmp_path}/i.h5"}}))
        with open_index(tmp_path / "i.h5") as index:
            assert values(index) == [("a", "K"), ("b", "k")]


class TestConfiguration:
    def test_a_set_has_the_keys_of_data_and_adds_properties(self) -> None:
        own = {"text": None, "properties": {"b": "y"}}
        plain = {"data": {"root": "/d", "text": "t", "properties": {"a": "x"}, "sets": {"s": own, "r": "/r"}}}
        config = from_plain(Config, {**plain, "index": {"path": "/i.h5"}})
        sets = config.data.sets
        assert (sets["s"].root, sets["s"].text, sorted(sets["s"].properties)) == ("/d", None, ["a", "b"])
        assert (sets["r"].root, sets["r"].text, sorted(sets["r"].properties)) == ("/r", "t", ["a"])
        assert from_plain(Config, to_plain(config)) == config, "a recorded configuration reads the same"

    def test_presets_enter_sets_by_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SCRATCH", "/s")
        words = ["+data@data.sets.code=starcoder", "+data@data.sets.web=slim_pajama", "data.sets.code.root=/b"]
        data = compose([*words, "index.path=/i.h5", "mixture.unit=samples"]).data
        assert data.roots() == {"code": "/b", "web": "/s/slimpajama"}
        assert (data.sets["code"].text, data.sets["web"].text) == ("content", "text")
        assert data.sets["code"].properties["stars"].kind == "number" and "stars" not in data.sets["web"].properties

    @pytest.mark.parametrize(
        ("sets", "message"),
        [
            (
                {"a": {"root": "/a", "properties": {"n": "n"}}, "b": {"root": "/b", "properties": {"n": NUMBER}}},
                r"data\.sets\.b\.properties\.n is a number, but data\.sets\.a\.properties\.n is a category",
            ),
            (
                {"a": {"root": "/a", "properties": {"n": {"path": "n", "pattern": "("}}}},
                r"data\.sets\.a\.properties\.n",
            ),
            ({"a": {"root": "/a", "txt": "t"}}, r"data\.sets\.a\.txt is not a known key\. Did you mean 'text'"),
        ],
    )
    def test_wrong_settings_name_their_set(self, sets: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            check_build(from_plain(Config, {"data": {"sets": sets}, "index": {"path": "/i.h5"}}))

    def test_a_set_with_another_text_than_the_index_is_refused(self, folder: Path) -> None:
        sets = sets_of(folder)
        sets["code"] = {**sets["code"], "text": "body"}
        with pytest.raises(PropertyIndexError, match=r"data\.sets\.code\.text is 'body', the index has 'content'"):
            open_configured(config_of(folder, "both", {"sets": sets}))
