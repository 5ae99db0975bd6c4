"""Documents that are made of several fields, or by a function: in every format, from the build to a run."""

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.index.read.verify import deeply_changed_shards
from mixtera_hpc.testing.writers import write_tar
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_vocabulary
from mixtera_hpc.trace.list import planned_sequences

ROWS = [{"title": f"t{i}", "meta": {"body": f"some body {i} " * (i % 7)}, "year": 2000 + i} for i in range(40)]
TEXTS = [f"{row['title']}\n\n{row['meta']['body']}({row['year']})" for row in ROWS]
TEMPLATE = "{title}\n\n{meta.body}({year})"
FUNCTION = "function:text_makers.join"
MODULE = """
def join(rows): return [f"{r['title']}\\n\\n{r['meta']['body']}({r['year']})" for r in rows]
def few(rows): return ["x"]
def endings(rows): return [sorted(r) for r in rows]
def none(rows): return [None for _ in rows]
def half(rows): return ["a\\ud83d" for _ in rows]
def broken(rows): raise KeyError("title")
"""


@pytest.fixture(autouse=True)
def _functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text_makers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "text_makers", raising=False)


def write_shard(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"a.{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=9)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
        path.write_bytes(compress(lines))


def configured(root: Path, text: str, **more: Any) -> Config:
    data = {"root": str(root / "data"), "include": ["*"], "text": text} | more.pop("data", {})
    train_bpe(TEXTS, 300, root / "tokenizer.json")
    plane = {"tokenizer": str(root / "tokenizer.json"), "seq_len": 16, "global_batch_size": 6, "audit": True}
    return from_plain(Config, {"data": data, "index": {"path": f"{root}/i.h5"}, "dataplane": plane} | more)


@pytest.mark.parametrize("text", [TEMPLATE, FUNCTION])
@pytest.mark.parametrize(
    "suffix",
    ["jsonl", pytest.param("jsonl.gz", marks=pytest.mark.full), "jsonl.zst", "parquet", "json"],
)
def test_a_run_over_composed_texts_is_proven_and_equals_one_over_a_single_field(
    suffix: str, text: str, tmp_path: Path, prove_run: Callable[[Config], int]
) -> None:
    write_shard(tmp_path / "data", suffix, ROWS)
    write_shard(tmp_path / "plain/data", suffix, [{"text": text} for text in TEXTS])
    config = configured(tmp_path, text, data={"include": [f"*.{suffix}"]})
    plain = configured(tmp_path / "plain", "text", data={"include": [f"*.{suffix}"]})
    report = build_index(config)
    assert report.tokens == build_index(plain).tokens
    assert prove_run(config) == 54
    with_digests = {"plan": {"digests": True}}
    sources = [open_source(from_plain(Config, {**to_plain(c), **with_digests}), Local()) for c in (config, plain)]
    composed, single = ([r["digest"] for r in planned_sequences(source, 0, 4)] for source in sources)
    assert composed == single
    with open_configured(config) as index:
        assert deeply_changed_shards(index, load_vocabulary(config.dataplane), Local()) == []
        assert index.text == text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"title": None, "meta": {"body": "b"}, "year": 1}, r"'title' of data\.text is null"),
        ({"title": "t", "year": 1}, r"'meta\.body' of data\.text is null"),
        ({"title": "t", "meta": {"body": ["b"]}, "year": 1}, r"'meta\.body' of data\.text is list"),
    ],
)
def test_a_row_without_a_field_is_bad(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "data", "jsonl", [*ROWS[:3], row, *ROWS[3:]])
    with pytest.raises(DataError, match="1 unreadable row") as caught:
        build_index(configured(tmp_path, TEMPLATE))
    assert any("row=3" in note for note in caught.value.__notes__)
    report = build_index(configured(tmp_path, TEMPLATE, data={"on_bad_sample": "skip"}))
    assert (report.samples, report.bad_rows) == (40, 1)
    with open_index(tmp_path / "i.h5") as index:
        assert index.bad[0].reason in problem.replace("\\", "")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{title", ConfigError, "which is no template: expected '}'"),
        ("{}", ConfigError, "expected fields such as"),
        ("{title!r}", ConfigError, "without formats"),
        ("function:text_makers.jion", ConfigError, r"data\.text is 'text_makers\.jion'.*Did you mean 'join'"),
        ("function:text_makers.few", DataError, "returned 1 texts for 40 rows"),
        ("function:text_makers.none", DataError, "unreadable rows"),
        ("function:text_makers.half", DataError, "unreadable rows"),
        (
            "function:text_makers.broken",
            DataError,
            r"text_makers\.broken, the function of data\.text, failed: KeyError",
        ),
    ],
)
def test_wrong_texts_are_refused(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "data", "jsonl", ROWS)
    with pytest.raises(error, match=message):
        build_index(configured(tmp_path, text))


def test_a_function_is_imported_only_if_the_configuration_names_it(tmp_path: Path) -> None:
    write_shard(tmp_path / "data", "jsonl", ROWS)
    build_index(configured(tmp_path, FUNCTION))
    other = configured(tmp_path, "text")
    with pytest.raises(PropertyIndexError, match=r"only if the configuration names it\.\n  Set data\.text=function:"):
        open_configured(other)
    with pytest.raises(PropertyIndexError, match="only if the configuration names it"):
        derive_properties(configured(tmp_path, "text", data={"properties": {"t": "title"}}))
    with open_configured(other, reads_shards=False) as index:
        assert index.tables.num_samples == 40, "counting imports nothing"


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_a_function_that_has_changed_since_the_build_is_noticed(unit: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "data", "jsonl", ROWS)
    config = configured(tmp_path, FUNCTION, mixture={"unit": unit})
    build_index(config)
    open_source(config, Local())
    (tmp_path / "text_makers.py").write_text(MODULE.replace("body']}(", "body']} ("))
    message = r"text_makers\.join, which makes the documents of .*, has changed since .*\n  Restore the file, or run"
    with pytest.raises(PropertyIndexError, match=message) as caught:
        open_source(config, Local())
    assert caught.value.exit_code == 2
    with pytest.raises(PropertyIndexError, match=message):
        derive_properties(configured(tmp_path, FUNCTION, data={"properties": {"t": "title"}}))
    build_index(config)
    open_source(config, Local())


def test_deriving_from_composed_texts_gives_what_a_build_gives(tmp_path: Path) -> None:
    write_shard(tmp_path / "data", "jsonl.gz", ROWS)
    build_index(configured(tmp_path, TEMPLATE))
    length = {"length": {"function": "mixtera_hpc.index.document_functions.length_bucket"}, "y": "year"}
    config = configured(tmp_path, TEMPLATE, data={"properties": length})
    derived = derive_properties(config)
    assert build_index(config).fingerprint == derived.fingerprint


def test_paths_into_tar_members_do_not_depend_on_other_properties(tmp_path: Path) -> None:
    """Functions and templates read whole rows; paths into them must give what they give alone."""
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/a.tar", "w") as archive:
        for i in range(9):
            for ending, content in (("txt", b"t"), ("cls", b"%d" % i), ("seg.json", b'{"k": "k%d"}' % (i % 2))):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    paths = {"label": "cls", "k": "seg.json.k"}
    endings = {"endings": {"function": "text_makers.endings", "over": "rows", "kind": "categories"}}
    build_index(configured(tmp_path, "{txt}", data={"properties": paths | endings}))
    with open_index(tmp_path / "i.h5") as index:
        values = {name: prop.values for name, prop in index.tables.properties.items()}
    assert values["label"] == tuple(map(str, range(9))) and values["k"] == ("k0", "k1")
    assert set(values["endings"]) >= {"cls", "seg.json", "txt"}, "functions see the members as they are"


def test_members_of_a_tar_file_are_joined(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"text": f"caption {i}", "title": f"t{i}"} for i in range(30)]
    (path,) = write_tar(tmp_path / "data", rows)
    config = configured(tmp_path, "{json.title}: {txt}")
    build_index(config)
    with open_configured(config) as index:
        assert deeply_changed_shards(index, load_vocabulary(config.dataplane), Local()) == []
        reader = open_reader(load_format("webdataset"), path, index.text, BlockCache())
        block = BlockRef.of(index.tables.blocks, 0)
        texts = reader.documents(block, index.read_block(0).length, np.arange(block.rows))
        reader.close()
    assert texts == [f"t{i}: caption {i}" for i in range(block.rows)]
