"""Properties from the shard's path, through a pattern, and from the user's parser."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.schema import DataConfig, PropertyConfig
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import RowBatch
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.path_properties import is_path_property, path_property_value
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.shard_file import ShardFile
from mixtera_hpc.formats.shard_scan import scan_shard, scan_spec_of
from mixtera_hpc.formats.user_functions import source_digest


def scan(root: Path, path: str, **data: Any) -> list[RowBatch]:
    spec = scan_spec_of(DataConfig(root=str(root), **data), documents=True)
    shard = ShardFile(root=root, path=path, format="jsonl")
    units = load_format("jsonl").units(root / path, (root / path).stat().st_size)
    return [batch for unit in units for batch in scan_shard(shard, unit, spec, 2)]


def values(batches: list[RowBatch], name: str) -> list[Any]:
    """Return the values of one property in all rows."""
    result: list[Any] = []
    for batch in batches:
        column = batch.columns[name]
        if isinstance(column, Categories):
            result += [column.values[code] for code in column.code]
        else:
            result += column.tolist()
    return result


def write(root: Path, path: str, *rows: dict[str, Any]) -> str:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("path", "shard", "expected"),
    [
        ("__path__", "a/lang=en/x.jsonl.gz", "a/lang=en/x.jsonl.gz"),
        ("__name__", "a/lang=en/x.jsonl.gz", "x.jsonl.gz"),
        ("__stem__", "a/lang=en/x.y.jsonl.gz", "x.y"),
        ("__stem__", "x.unknown", "x"),
        ("__parent__", "a/b/x.jsonl", "b"),
        ("__parent__", "x.jsonl", None),
        ("__folder__", "a/b/x.jsonl", "a/b"),
        ("__folder__", "x.jsonl", None),
        ("__folder__.0", "a/b/x.jsonl", "a"),
        ("__folder__.-1", "a/b/x.jsonl", "b"),
        ("__folder__.2", "a/b/x.jsonl", None),
        ("__folder__.-3", "a/b/x.jsonl", None),
        ("__partition__.lang", "a/lang=en=us/x.jsonl", "en=us"),
        ("__partition__.lang", "lang=de/lang=en/x.jsonl", "en"),
        ("__partition__.dump", "a/lang=en/x.jsonl", None),
        ("__format__", "x.jsonl", "jsonl"),
    ],
)
def test_a_path_property_has_the_value_of_the_shard(path: str, shard: str, expected: str | None) -> None:
    assert is_path_property(path)
    assert path_property_value(path, shard, "jsonl") == expected


@pytest.mark.parametrize("path", ["__index_level_0__", "meta.__path__", "path", "__key__"])
def test_other_names_between_underscores_are_keys_of_the_row(path: str) -> None:
    assert not is_path_property(path)


@pytest.mark.parametrize("path", ["__partition__", "__folder__.first", "__path__.x", "__partition__."])
def test_an_unknown_path_property_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="is not a property of a shard"):
        is_path_property(path)


def test_properties_come_from_the_path_and_from_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "web/x.jsonl", {"text": "a", "language": "en"}, {"text": "b"}, {"text": "c"})
    properties = {"source": PropertyConfig(path="__parent__"), "language": PropertyConfig(path="language")}
    batches = scan(tmp_path, path, properties=properties)
    assert values(batches, "source") == [("web",)] * 3
    assert values(batches, "language") == [("en",), (), ()]


def test_a_pattern_extracts_its_first_group_or_the_whole_match(tmp_path: Path) -> None:
    path = write(tmp_path, "y/2023-06/x.jsonl", {"text": "", "url": "http://a.org/1"}, {"text": "", "url": "ftp:"})
    properties = {
        "host": PropertyConfig(path="url", pattern="//([^/]+)"),
        "scheme": PropertyConfig(path="url", pattern="^[a-z]+"),
        "year": PropertyConfig(path="__parent__", pattern=r"(\d{4})-", kind="number"),
        "length": PropertyConfig(path="url", pattern=r"\d", kind="number"),
    }
    batches = scan(tmp_path, path, properties=properties)
    assert values(batches, "host") == [("a.org",), ()]
    assert values(batches, "scheme") == [("http",), ("ftp",)]
    assert values(batches, "year") == [2023.0, 2023.0]
    assert np.array_equal(values(batches, "length"), [1.0, np.nan], equal_nan=True)


def test_a_pattern_that_matches_no_number_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", {"text": ""})
    properties = {"year": PropertyConfig(path="__name__", pattern="(x)", kind="number")}
    with pytest.raises(ConfigError, match=r"data\.properties\.year has kind number, but .*'x'"):
        scan(tmp_path, path, properties=properties)


@pytest.fixture
def parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a user's module `team_parsers` and return its folder."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "team_parsers.py").write_text(
        "LIMIT = 3\n"
        "def sizes(row):\n"
        "    words = row['text'].split()\n"
        "    return {'words': len(words), 'meta': {'first': words[0]}, 'tags': sorted(set(words)), 'text': 7}\n"
        "def wrong(row):\n"
        "    return {'words': 'many'}\n"
        "def half(row):\n"
        "    return {'tags': '\\ud800'}\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("team_parsers", None)


PARSED = {
    "words": PropertyConfig(path="words", kind="number"),
    "first": PropertyConfig(path="meta.first"),
    "tags": PropertyConfig(path="tags", kind="categories"),
    "source": PropertyConfig(path="__stem__"),
}


def test_a_parser_computes_properties_from_whole_rows(parsers: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", *[{"text": t} for t in ("b a", "c", "a a b")])
    batches = scan(tmp_path, path, properties=PARSED, parser="team_parsers.sizes")
    assert values(batches, "words") == [2, 1, 3]
    assert values(batches, "first") == [("b",), ("c",), ("a",)]
    assert values(batches, "tags") == [("a", "b"), ("c",), ("a", "b")]
    assert values(batches, "source") == [("x",)] * 3
    assert [d for b in batches for d in b.documents or []] == ["b a", "c", "a a b"]


def test_rows_that_a_parser_fails_on_are_named_or_skipped(parsers: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", *[{"text": t} for t in ("a", "", "b", "")])
    with pytest.raises(DataError, match=r"team_parsers\.sizes fails on rows of .*x\.jsonl") as caught:
        scan(tmp_path, path, properties=PARSED, parser="team_parsers.sizes")
    assert ["row=1: " in n or "row=3: " in n for n in caught.value.__notes__] == [True, True]
    assert "IndexError: list index out of range" in caught.value.__notes__[0]
    batches = scan(tmp_path, path, properties=PARSED, parser="team_parsers.sizes", on_bad_sample="skip")
    assert [row for b in batches for row, _ in b.bad] == [1, 3]
    assert values(batches, "words")[0] == 1


def test_values_of_another_kind_from_a_parser_are_refused(parsers: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", {"text": "a"})
    with pytest.raises(DataError) as caught:
        scan(tmp_path, path, properties=PARSED, parser="team_parsers.wrong")
    assert "Expected `float | null`, got `str` - at `$.words`" in caught.value.__notes__[0]


def test_lone_surrogates_from_a_parser_are_refused(parsers: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", {"text": "a"})
    with pytest.raises(
        ConfigError, match=r"data\.parser team_parsers\.half returned a value for a row of x\.jsonl .*surrogates"
    ):
        scan(tmp_path, path, properties=PARSED, parser="team_parsers.half")


def test_functions_without_python_source_share_one_digest() -> None:
    assert source_digest(os.getcwd) == source_digest(os.getpid)


@pytest.mark.parametrize(
    ("parser", "message"),
    [
        ("sizes", r"expected package\.module\.function"),
        ("no_such_package.sizes", r"no_such_package cannot be imported.*\n.*PYTHONPATH"),
        ("team_parsers.size", r"size does not exist in team_parsers.*Did you mean .sizes.*\n  Name a function"),
        ("team_parsers.LIMIT", "LIMIT is of type int, not a function"),
    ],
)
def test_a_missing_parser_is_refused(parser: str, message: str, parsers: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        scan_spec_of(DataConfig(root="x", parser=parser), documents=False)


def test_a_changed_parser_has_another_fingerprint(parsers: Path) -> None:
    data = DataConfig(root="x", parser="team_parsers.sizes")
    before = scan_spec_of(data, documents=False).parser
    with (parsers / "team_parsers.py").open("a") as file:
        file.write("# changed\n")
    assert scan_spec_of(data, documents=False).parser != before
