"""Meaning of a dotted path: shape of the row × depth of the path × format × {build, verify, query, run, samples}."""

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

from mixtera_hpc.cli.main import main
from mixtera_hpc.index.read.open import open_index

Answers = Callable[..., dict[str, str]]
Row = dict[str, Any]


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_tar(path: Path, rows: list[Row]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            info = tarfile.TarInfo(f"{number}.json")
            data = json.dumps(row).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_arrow(path: Path, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


FORMATS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "arrow": write_arrow,
    "tar": write_tar,
}
# What a row has in place of `meta`, `lang` or `a.b` → row.
SHAPES: dict[str, Row] = {
    "absent": {},
    "null": {"meta": None},
    "a text": {"meta": "de"},
    "a number": {"meta": 7},
    "a list": {"meta": ["de"]},
    "a list of objects": {"meta": [{"lang": "de"}]},
    "an object without the key": {"meta": {"other": 1}},
    "a null value": {"meta": {"lang": None}},
    "a text one level deeper": {"meta": {"lang": "de"}},
}
PATHS = ["meta.lang", "meta.lang.code", "meta.lang.code.x"]
KINDS = ["category", "categories", "number"]


def has_value(shape: str, path: str) -> bool:
    return shape == "a text one level deeper" and path == "meta.lang"


def build(answers: Answers, tmp_path: Path, ending: str, rows: list[Row], **data: Any) -> dict[str, str]:
    (tmp_path / "data").mkdir(exist_ok=True)
    FORMATS[ending](tmp_path / f"data/a.{ending}", rows)
    prefix = "json." if ending == "tar" else ""
    text = data.pop("text", "text")
    properties = {
        name: {"path": f"{prefix}{path}", "kind": kind} for name, (path, kind) in data.pop("properties").items()
    }
    return answers(f"{prefix}{text}", properties=properties, include=[f"*.{ending}"], **data)


def values(tmp_path: Path, name: str) -> list[Any]:
    """Return the values of a property in index order."""
    with open_index(tmp_path / "i.h5") as index:
        columns = [index.read_block(block) for block in range(len(index.tables.blocks))]
        if name in columns[0].numbers:
            return np.concatenate([column.numbers[name] for column in columns]).tolist()
        combos = np.concatenate([column.combo for column in columns]).tolist()
        return ["|".join(index.tables.combos.values(name, combo)) or None for combo in combos]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_properties_without_values_are_null(shape: str, ending: str, tmp_path: Path, answers: Answers) -> None:
    # A path has one value or a list of values, so the two kinds of categories need paths of their own.
    properties = {
        "number": ("meta.lang.code", "number"),
        "category": ("meta.lang.code", "category"),
        "categories": ("meta.more.code", "categories"),
    }
    answered = build(answers, tmp_path, ending, [{"text": "one", **SHAPES[shape]}] * 2, properties=properties)
    assert answered["build"] == "2 samples, 0 bad rows, 0 damaged"
    assert (answered["verify"], answered["query"], answered["samples"]) == ("fresh", "2 samples", "2 served")
    for name, (_, kind) in properties.items():
        assert repr(values(tmp_path, name)) == repr([np.nan if kind == "number" else None] * 2)


@pytest.mark.full
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_property_without_a_value_is_null(
    shape: str, path: str, ending: str, tmp_path: Path, answers: Answers
) -> None:
    if has_value(shape, path):
        pytest.skip("this path has a value")
    for kind in KINDS:
        answered = build(
            answers, tmp_path, ending, [{"text": "one", **SHAPES[shape]}] * 2, properties={"p": (path, kind)}
        )
        assert answered["build"] == "2 samples, 0 bad rows, 0 damaged"
        assert (answered["verify"], answered["query"], answered["samples"]) == ("fresh", "2 samples", "2 served")
        assert repr(values(tmp_path, "p")) == repr([np.nan if kind == "number" else None] * 2)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("shape", ["absent", "null", "a text", "a list", "an object without the key"])
def test_a_text_without_a_value_is_refused(shape: str, ending: str, tmp_path: Path, answers: Answers) -> None:
    rows = [{"text": "one", **SHAPES[shape]}]
    refused = build(answers, tmp_path, ending, rows, text="meta.lang", properties={})["build"]
    name = "json.meta.lang" if ending == "tar" else "meta.lang"
    expected = [f"no text at {name!r}", f"has no column {name!r}", f"no member for data.text={name}"]
    assert refused.startswith("DataError") and any(message in refused for message in expected)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_key_with_dots_is_found_before_the_nested_one(ending: str, tmp_path: Path, answers: Answers) -> None:
    rows = [{"doc.text": f"text {i}", "meta.lang": "en", "deep": {"a.b": i, "c": {"d": "x"}}} for i in range(3)]
    properties = {
        "lang": ("meta.lang", "category"),
        "number": ("deep.a.b", "number"),
        "nested": ("deep.c.d", "category"),
    }
    answered = build(answers, tmp_path, ending, rows, text="doc.text", properties=properties)
    assert answered["build"] == "3 samples, 0 bad rows, 0 damaged"
    assert (answered["tokens"], answered["verify"], answered["samples"]) == ("18", "fresh", "3 served")
    assert values(tmp_path, "lang") == ["en"] * 3
    assert values(tmp_path, "number") == [0, 1, 2]
    assert values(tmp_path, "nested") == ["x"] * 3


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
def test_both_meanings_in_one_file_are_refused(
    ending: str, on_bad_sample: str, tmp_path: Path, answers: Answers
) -> None:
    rows = [{"text": "a", "meta": {"lang": "de"}}, {"text": "b", "meta.lang": "en"}]
    rows = rows if ending not in ("parquet", "arrow") else [{**rows[0], **rows[1]}]
    refused = build(
        answers, tmp_path, ending, rows, properties={"l": ("meta.lang", "category")}, on_bad_sample=on_bad_sample
    )["build"]
    assert "has values for more than one meaning of the path" in refused and "meta.lang" in refused


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
def test_both_meanings_in_a_template_are_refused(
    ending: str, on_bad_sample: str, tmp_path: Path, answers: Answers
) -> None:
    rows: list[Row] = [{"text": "a", "meta": {"t": "x"}}, {"text": "b", "meta.t": "y"}]
    rows = rows if ending not in ("parquet", "arrow") else [{**rows[0], **rows[1]}]
    prefix = "json." if ending == "tar" else ""
    (tmp_path / "data").mkdir()
    FORMATS[ending](tmp_path / f"data/a.{ending}", rows)
    refused = answers(f"{{{prefix}meta.t}}", include=[f"*.{ending}"], on_bad_sample=on_bad_sample)["build"]
    assert "has values for more than one meaning of the path" in refused and "meta.t" in refused


def test_both_meanings_in_what_a_parser_returns_are_refused(
    tmp_path: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_meanings.py").write_text("def parse(row): return {row['k']: 1, 'a': {'b': 2}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_bytes(lines([{"text": "t", "k": "c"}, {"text": "t", "k": "a.b"}]))
    refused = answers(parser="two_meanings.parse", properties={"p": {"path": "a.b", "kind": "number"}})["build"]
    assert "has values for more than one meaning of the path 'a.b'" in refused


def test_both_meanings_far_apart_in_a_large_file_are_refused(tmp_path: Path, answers: Answers) -> None:
    (tmp_path / "data").mkdir()
    # 70 MB: the file is scanned in two units.
    rows = [{"text": "a", "meta": {"lang": "de"}}, *({"text": "x" * 10_000_000} for _ in range(7))]
    (tmp_path / "data/a.jsonl").write_bytes(lines([*rows, {"text": "b", "meta.lang": "en"}]))
    refused = answers(text=None, properties={"l": "meta.lang"})["build"]
    assert "has values for more than one meaning of the path 'meta.lang': 'meta.lang' and 'meta' → 'lang'" in refused


@pytest.mark.parametrize("ending", FORMATS)
def test_a_path_may_be_both_a_number_and_a_category(ending: str, tmp_path: Path, answers: Answers) -> None:
    rows = [{"text": "a", "meta": {"year": year}, "top": year} for year in (2019, None, 2020)]
    properties = {
        "year": ("meta.year", "number"),
        "bucket": ("meta.year", "category"),
        "top": ("top", "number"),
        "tops": ("top", "categories"),
    }
    assert build(answers, tmp_path, ending, rows, properties=properties)["samples"] == "3 served"
    assert repr(values(tmp_path, "year")) == repr(values(tmp_path, "top")) == "[2019.0, nan, 2020.0]"
    assert values(tmp_path, "bucket") == values(tmp_path, "tops") == ["2019", None, "2020"]


@pytest.mark.parametrize("ending", ["jsonl", "json", pytest.param("jsonl.gz", marks=pytest.mark.full), "tar"])
@pytest.mark.parametrize(("value", "name"), [("x", "str"), (True, "bool"), (10**400, "int")])
def test_a_category_that_is_no_number_is_a_bad_row_of_the_number(
    value: Any, name: str, ending: str, tmp_path: Path, answers: Answers
) -> None:
    rows = [{"text": "a", "top": 1}, {"text": "b", "top": value}]
    properties = {"number": ("top", "number"), "category": ("top", "category")}
    refused = build(answers, tmp_path, ending, rows, properties=properties)["build"]
    assert f"row=1: Expected `float | null`, got `{name}`" in refused
    skipped = build(answers, tmp_path, ending, rows, properties=properties, on_bad_sample="skip")
    assert (skipped["build"], skipped["samples"]) == ("1 samples, 1 bad rows, 0 damaged", "1 served")


def test_a_build_prints_the_share_of_nulls_per_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in {
        "web": [{"q": 1, "l": "en"}, {"q": None}, {}, {"q": 2}],
        "code": [{"l": "c"}, {"meta": 1}],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(lines([{"text": "a", **row} for row in rows]) + b"{\n")
    sets = f"data.sets={{web: {tmp_path / 'web'}, code: {tmp_path / 'code'}}}"
    words = [sets, f"index.path={tmp_path / 'i.h5'}", "data.on_bad_sample=skip"]
    words += ["data.properties.l=l", "data.properties.q={path: q, kind: number}"]
    assert main(["index", "build", *words]) == 0
    printed = capsys.readouterr().out
    assert "null in web: l 75.0%, q 50.0%" in printed and "null in code: l 50.0%, q 100.0%" in printed
