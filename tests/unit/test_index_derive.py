"""Deriving: add properties that a function computes from documents."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.formats.readers.jsonl import JsonlFormat
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index import document_functions
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.read.open import PropertyIndex, open_index

BASE = {"c": "c", "n": {"path": "n", "kind": "number"}}
DERIVED = {
    "a_size": {"function": "my_functions.size", "kind": "number"},
    "first": {"function": "my_functions.first"},
    "length": {"function": "my_functions.length", "kind": "number"},
    "letters": {"function": "my_functions.letters", "kind": "categories"},
}
MODULE = """
def size(documents): return [len(d) if d else None for d in documents]
def length(documents): return [len(d) for d in documents]
def first(documents): return [d[0] if d else None for d in documents]
def letters(documents): return [sorted(set(d[:3])) for d in documents]
def few(documents): return [0] * (len(documents) - 1)
def wrong(documents): return [object()] * len(documents)
def half(documents): return ["\\ud800"] * len(documents)
def huge(documents): return [10**400] * len(documents)
def broken(documents): raise RuntimeError("no model")
def n_of_row(rows): return [row["n"] for row in rows]
def first_of_row(rows): return [row["text"][:1] or None for row in rows]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_functions", raising=False)
    (tmp_path / "data").mkdir()
    rows = [json.dumps(row).encode() + b"\n" for row in documents(37)]
    (tmp_path / "data" / "a.jsonl").write_bytes(b"".join([*rows[:5], b"{bad\n", *rows[5:20]]))
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[20:])))
    return tmp_path


def documents(count: int) -> list[dict[str, Any]]:
    return [{"text": "xyz"[: i % 4] * (i % 5), "c": "pq"[i % 2], "n": i, "w": "w"} for i in range(count)]


def configured(root: Path, properties: dict[str, Any], name: str = "i.h5") -> Config:
    data = {"root": str(root / "data"), "properties": properties, "on_bad_sample": "skip"}
    return from_plain(Config, {"data": data, "index": {"path": str(root / name), "block_rows": 8}})


def properties_of(index: PropertyIndex) -> list[dict[str, Any]]:
    """Return all properties of every sample, in order; nothing for samples that cannot be read."""
    tables = index.tables
    content: list[dict[str, Any]] = []
    for b in range(len(tables.blocks)):
        samples = index.read_block(b)
        for i, combo in enumerate(samples.combo.tolist()):
            values: dict[str, Any] = {name: tables.combos.values(name, combo) for name in tables.combos.properties}
            values |= {name: repr(column[i].item()) for name, column in samples.numbers.items()}
            content.append({} if combo == tables.combos.bad else values)
    return content


def test_deriving_gives_what_building_with_the_functions_gives(root: Path) -> None:
    build_index(configured(root, BASE))
    report = derive_properties(configured(root, BASE | DERIVED))
    build_index(configured(root, BASE | DERIVED, "fresh.h5"))
    assert report.derived == ("a_size", "first", "length", "letters")
    with open_index(root / "i.h5") as derived, open_index(root / "fresh.h5") as fresh:
        assert properties_of(derived) == properties_of(fresh)
        assert derived.fingerprint == fresh.fingerprint, "columns, tables, dictionaries, sources: all the same"
        assert derived.bad == fresh.bad and derived.sources == fresh.sources


NEW = {
    "m": "meta.m",
    "stem": "__stem__",
    "digit": {"path": "meta.m", "pattern": "([0-9])", "kind": "number"},
    "n_bucket": {"number": "n", "buckets": [0, 4, 9]},
    "size_bucket": {"number": "a_size", "buckets": [1, 5, 20]},
    "row_n": {"function": "my_functions.n_of_row", "over": "rows", "kind": "number"},
    "row_first": {"function": "my_functions.first_of_row", "over": "rows"},
    "a_size": {"function": "my_functions.size", "kind": "number"},
}


@pytest.fixture
def formats(root: Path) -> Path:
    """Return `root` with shards of several formats: a bad row, a damaged end, many units, and empty files."""
    rows = [{**row, "meta": {"m": f"m{i % 3}"}} for i, row in enumerate(documents(60))]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    data = root / "data"
    (data / "c.jsonl").write_bytes(b"\n".join([*lines[:30], b"[bad\n", *lines[30:]]))
    (data / "d.jsonl.gz").write_bytes(gzip.compress(b"".join(lines))[:-40])
    (data / "e.jsonl.zst").write_bytes(
        b"".join(zstandard.compress(b"".join(lines[i : i + 9])) for i in range(0, 60, 9))
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "f.parquet", row_group_size=7)
    return root


@pytest.mark.parametrize("again", [False, True])
def test_new_paths_buckets_and_row_functions_give_what_a_build_gives(
    again: bool, formats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtera_hpc.index.build.derive_scan.RESULT_ROWS", 10)
    for module in ("build", "derive"):
        monkeypatch.setattr(
            f"mixtera_hpc.index.build.{module}.load_format",
            lambda name: JsonlFormat(unit_bytes=45) if name == "jsonl" else load_format(name),
        )
    base = BASE | ({"m": "meta.wrong", "row_n": NEW["row_n"]} if again else {})
    build_index(configured(formats, base))
    report = derive_properties(configured(formats, BASE | NEW), again=again)
    assert report.derived == tuple(sorted(NEW)) and report.units > 10
    build_index(configured(formats, BASE | NEW, "fresh.h5"))
    with open_index(formats / "i.h5") as derived, open_index(formats / "fresh.h5") as fresh:
        assert properties_of(derived) == properties_of(fresh)
        assert derived.fingerprint == fresh.fingerprint
        assert derived.bad == fresh.bad and len(derived.bad) > 2 and derived.sources == fresh.sources
        values = derived.tables.properties
        assert values["n_bucket"].values == ("[0,4)", "[4,9]") and values["m"].values == ("m0", "m1", "m2")


def test_buckets_of_a_stored_number_read_no_shard(root: Path) -> None:
    build_index(configured(root, BASE))
    report = derive_properties(configured(root, BASE | {"b": NEW["n_bucket"]}))
    assert report.bytes_read == 0
    with open_index(root / "i.h5") as index:
        numbers = [(row["b"], float(row["n"])) for row in properties_of(index) if row]
        assert all(b == (("[0,4)",) if n < 4 else ("[4,9]",) if n <= 9 else ()) for b, n in numbers)


def test_buckets_of_an_unknown_number_are_refused(root: Path) -> None:
    unknown = BASE | {"b": {"number": "nn", "buckets": [0, 1]}}
    with pytest.raises(ConfigError, match=r"properties\.b has buckets of nn, which is not a number property.*'n'"):
        build_index(configured(root, unknown))
    build_index(configured(root, BASE))
    with pytest.raises(ConfigError, match="not a number property"):
        derive_properties(configured(root, unknown))
    with pytest.raises(ConfigError, match=r"buckets of tokens, which is not counted\. Set dataplane\.tokenizer"):
        build_index(configured(root, {"b": {"number": "tokens", "buckets": [0, 1]}}))
    stored = configured(root, {"b": {"number": "n", "buckets": [0, 1]}})
    assert derive_properties(stored).derived == ("b",), "a number that only the index names"


def test_a_value_of_the_wrong_kind_names_its_row(root: Path) -> None:
    build_index(configured(root, BASE))
    config = configured(root, BASE | {"x": {"path": "w", "kind": "number"}})
    config = replace(config, data=replace(config.data, on_bad_sample="fail"))
    with pytest.raises(DataError, match="of which the new properties cannot be read") as caught:
        derive_properties(config)
    assert "a.jsonl' row=0: " in caught.value.__notes__[0] or "b.jsonl.gz' row=0: " in caught.value.__notes__[0]


def test_a_value_of_the_wrong_kind_is_null_where_bad_samples_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"text": "t", "n": i, "q": "high" if i in (3, 20) else i, "k": "v"} for i in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "data/a.jsonl").write_bytes(lines)
    (tmp_path / "data/b.jsonl.gz").write_bytes(gzip.compress(lines))
    build_index(configured(tmp_path, {"n": BASE["n"]}))
    new = {"q": {"path": "q", "kind": "number"}, "k": "k", "b": {"number": "q", "buckets": [0, 10, 40]}}
    report = derive_properties(configured(tmp_path, {"n": BASE["n"]} | new))
    assert report.samples == 60
    with open_index(tmp_path / "i.h5") as index:
        found = properties_of(index)
    assert [row["q"] for row in found] == ["nan" if i in (3, 20) else f"{i}.0" for i in range(30)] * 2
    assert [row["n"] for row in found] == [f"{i}.0" for i in range(30)] * 2
    assert [row["k"] for row in found] == [() if i in (3, 20) else ("v",) for i in range(30)] * 2
    assert [bool(row["b"]) for row in found] == [i not in (3, 20) for i in range(30)] * 2
    assert (
        "a.jsonl: new properties are null in 2 unreadable rows, first in row 3: Expected `float | null`" in caplog.text
    )


def test_the_values_are_those_of_the_function(root: Path) -> None:
    build_index(configured(root, BASE))
    derive_properties(configured(root, BASE | DERIVED))
    with open_index(root / "i.h5") as index:
        rows = [row for row in properties_of(index) if row]
        texts = [row["text"] for row in documents(37)]
        assert [row["first"] for row in rows] == [(t[0],) if t else () for t in texts]
        assert [row["letters"] for row in rows] == [tuple(sorted(set(t[:3]))) for t in texts]
        assert [row["a_size"] for row in rows] == [repr(float(len(t))) if t else "nan" for t in texts]
        assert [row["n"] for row in rows] == [repr(float(i)) for i in range(37)]
        zones = index.tables.blocks.zones["a_size"]
        assert np.nanmax(zones.high) == max(map(len, texts)) and zones.has_null.any()


def test_existing_properties_are_recomputed_only_with_again(root: Path) -> None:
    build_index(configured(root, BASE))
    config = configured(root, BASE | DERIVED)
    derive_properties(config)
    with pytest.raises(ConfigError, match="the index has all these properties already"):
        derive_properties(config)
    (root / "my_functions.py").write_text(MODULE.replace("d[0] if d", "d[-1] if d"))
    del sys.modules["my_functions"]
    derive_properties(config, again=True)
    with open_index(root / "i.h5") as index:
        rows = [row["first"] for row in properties_of(index) if row]
        assert rows == [(row["text"][-1],) if row["text"] else () for row in documents(37)]


def test_a_refresh_computes_derived_properties_of_new_shards(root: Path) -> None:
    build_index(configured(root, BASE))
    derive_properties(configured(root, BASE | DERIVED))
    (root / "data" / "c.jsonl").write_text('{"text": "weg", "c": "p", "n": 1}')
    with pytest.raises(PropertyIndexError, match=r"data\.properties\.first: category function:my_functions\.first"):
        refresh_index(configured(root, BASE))
    refresh_index(configured(root, BASE | DERIVED))
    with open_index(root / "i.h5") as index:
        assert properties_of(index)[-1]["first"] == ("w",)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            {"x": {"function": "my_functions.few"}},
            DataError,
            r"my_functions\.few returned 36 values for 37|for \d+ doc",
        ),
        ({"x": {"function": "my_functions.wrong"}}, DataError, r"no category of data\.properties\.x: got object"),
        ({"x": {"function": "my_functions.first", "kind": "number"}}, DataError, r"no number of data\.properties\.x"),
        (
            {"x": {"function": "my_functions.half"}},
            DataError,
            r"no category of data\.properties\.x: .* surrogates not allowed",
        ),
        (
            {"x": {"function": "my_functions.huge", "kind": "number"}},
            DataError,
            r"no number of data\.properties\.x: int too",
        ),
        (
            {"x": {"function": "my_functions.frist"}},
            ConfigError,
            r"data\.properties\.x\.function is 'my_functions\.frist'",
        ),
        ({"x": {"function": "nowhere.first"}}, ConfigError, r"nowhere cannot be imported"),
        ({"x": {"function": "first"}}, ConfigError, r"expected package\.module\.function"),
        ({"c": {"function": "my_functions.first"}}, PropertyIndexError, r"has a property 'c' already, from path:c"),
        ({}, ConfigError, "names no function"),
        ({"c": "w"}, PropertyIndexError, r"has a property 'c' already, from path:c"),
    ],
)
def test_a_failed_derivation_names_the_problem_and_keeps_the_index(
    spec: dict[str, Any], error: type[Exception], message: str, root: Path
) -> None:
    build_index(configured(root, BASE))
    before = (root / "i.h5").read_bytes()
    with pytest.raises(error, match=message):
        derive_properties(configured(root, BASE | spec))
    assert (root / "i.h5").read_bytes() == before


def test_an_exception_of_the_function_names_the_property(root: Path) -> None:
    build_index(configured(root, BASE))
    with pytest.raises(
        DataError, match=r"the function of data\.properties\.x, failed: RuntimeError: no model"
    ) as caught:
        derive_properties(configured(root, BASE | {"x": {"function": "my_functions.broken"}}))
    (note,) = caught.value.__notes__
    assert note.startswith("shard=") and note.endswith(" row=0")


@pytest.mark.parametrize("over", ["documents", "rows"])
@pytest.mark.parametrize("body", ["raise KeyError(a)", "return [object() if 'seven' in str(x) else 0 for x in a]"])
@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
def test_a_build_names_property_shard_and_row_of_a_failing_function(
    over: str, body: str, on_bad_sample: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "my_functions.py").write_text(
        f"def seven(a):\n    if any('seven' in str(x) for x in a): {body}\n    return [0] * len(a)\n"
    )
    sys.modules.pop("my_functions", None)
    folder = root / "one"
    folder.mkdir()
    rows = [b'{"text": "row"}', b'{"text": 1}' if on_bad_sample == "skip" else b'{"text": ""}', b'{"text": "seven"}']
    (folder / "a.jsonl").write_bytes(b"\n".join(rows))
    words = [f"data.root={folder}", f"index.path={root / 'one.h5'}", f"data.on_bad_sample={on_bad_sample}"]
    words.append(f"data.properties.x={{function: my_functions.seven, kind: number, over: {over}}}")
    assert main(["index", "build", *words]) == 2
    error = capsys.readouterr().err
    assert "data.properties.x" in error and f"shard='{folder}/a.jsonl' row=2" in error and "Traceback" not in error


def test_changed_shards_are_refused(root: Path) -> None:
    build_index(configured(root, BASE))
    with (root / "data" / "a.jsonl").open("a") as file:
        file.write('{"text": "late"}\n')
    with pytest.raises(PropertyIndexError, match="is stale"):
        derive_properties(configured(root, BASE | DERIVED))


def test_shipped_functions_return_what_they_document() -> None:
    prose = "The committee met on Tuesday and agreed on nothing in particular, which surprised no one. " * 3
    assert document_functions.length_bucket(["", "x" * 99, "x" * 100, "x" * 10_000]) == [
        *("under_100", "under_100", "100_to_300", "over_10k"),
    ]
    noise = bytes(range(33, 127)).decode()
    ratios = document_functions.compression_ratio(["short", noise, prose * 20])
    assert ratios[0] is None and ratios[1] is not None and ratios[2] is not None and ratios[1] < 1.1 < 10 < ratios[2]
    assert document_functions.mean_word_length(["", "ab abcd"]) == [None, 3.0]
    assert document_functions.repeated_line_share(["", "a\nb\n\na\na"]) == [0.0, 0.5]
    assert document_functions.main_script(["12 3", "Straße", "привет, John", "漢字かな漢字"]) == [
        *(None, "LATIN", "CYRILLIC", "CJK"),
    ]
