"""JSON lines: errors for bad rows and changed shards, and any division into units."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import BlockRef, PropertyField, ScanSpec
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import read_fully
from mixtera_hpc.formats.readers.jsonl import JsonlFormat, JsonRowReader
from mixtera_hpc.formats.registry import format_name_of, load_format
from mixtera_hpc.testing.format_cases import read_blocks, scan_whole_shard

LANGUAGE = PropertyField(name="language", path="meta.language", kind=Kind.CATEGORY)
QUALITY = PropertyField(name="quality", path="quality", kind=Kind.NUMBER)


def scan(path: Path, *properties: PropertyField, text: str = "text", fmt: JsonlFormat | None = None) -> list[str]:
    fmt = fmt or JsonlFormat()
    spec = ScanSpec(text=text, properties=properties, documents=True)
    batches = [b for u in fmt.units(path, path.stat().st_size) for b in fmt.scan(path, u, spec, 4)]
    return [d for b in batches for d in b.documents or []]


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "shard.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{}", "missing required field `text`"),
        ('{"text": null}', "Expected `str`, got `null` - at `$.text`"),
        ('{"text": 3}', "Expected `str`, got `int` - at `$.text`"),
        ('{"text": "x"', "truncated"),
        ("[1, 2]", "Expected `object`, got `array`"),
        (b'{"text": "\xff"}', "codec can't decode"),
        ('{"text": "x"} {"text": "y"}', "trailing characters"),
        ('{"text": "x"}{', "trailing characters"),
        ('{"text": "x", "meta": {"language": ["en"]}}', "got `array` - at `$.meta.language`"),
        ('{"text": "x", "quality": "high"}', "Expected `float | null`, got `str` - at `$.quality`"),
        ('{"text": "x", "quality": true}', "Expected `float | null`, got `bool` - at `$.quality`"),
        ("[" * 100_000, ""),
        ("\x0b\x0c", "invalid character"),
        (b'\xef\xbb\xbf{"text": "x"}', "begins with a byte order mark: write the file as UTF-8 without one"),
    ],
)
def test_a_bad_row_is_named_with_its_problem(line: str | bytes, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "good"}', "", line, '{"text": "good"}')
    with pytest.raises(DataError, match="1 unreadable row") as caught:
        scan(path, LANGUAGE, QUALITY)
    assert len(caught.value.__notes__) == 1
    assert f"shard={str(path)!r} row=1: " in caught.value.__notes__[0] and problem in caught.value.__notes__[0]


def test_the_first_ten_bad_rows_are_named_and_no_more(tmp_path: Path) -> None:
    path = write(tmp_path, *['{"text": "x"}' if i % 3 else "oops" for i in range(90)])
    with pytest.raises(DataError, match="at least 10 unreadable rows") as caught:
        scan(path)
    assert [note.split("row=")[1].split(":")[0] for note in caught.value.__notes__] == [str(3 * i) for i in range(10)]


def test_bad_rows_of_a_later_unit_are_counted_from_the_start_of_the_shard(tmp_path: Path) -> None:
    path = write(tmp_path, *['{"text": "x"}\n' if i != 41 else "oops" for i in range(60)])
    with pytest.raises(DataError) as caught:
        scan(path, fmt=JsonlFormat(unit_bytes=100, segment_bytes=32))
    assert "row=41: " in caught.value.__notes__[0]


def test_two_rows_on_one_line_and_one_row_on_two_lines_are_both_bad(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a"}{"text":', '"b"}')
    with pytest.raises(DataError, match="2 unreadable rows"):
        scan(path)


def test_a_line_longer_than_a_unit_belongs_to_the_unit_where_it_begins(tmp_path: Path) -> None:
    texts = ["a" * 10, "b" * 5000, "c"]
    path = write(tmp_path, *[json.dumps({"text": t}) for t in texts])
    assert scan(path, fmt=JsonlFormat(unit_bytes=64, segment_bytes=16)) == texts


@pytest.mark.parametrize("segment_bytes", [1, 7, 64, 1000])
def test_every_size_of_unit_gives_every_row_once(segment_bytes: int, tmp_path: Path) -> None:
    texts = ["", "b", "long " * 8, "d"]
    path = write(tmp_path, "", *[json.dumps({"text": t}) for t in texts], " ")
    for unit_bytes in range(1, path.stat().st_size + 2):
        assert scan(path, fmt=JsonlFormat(unit_bytes=unit_bytes, segment_bytes=segment_bytes)) == texts, unit_bytes


def test_the_text_may_lie_deep_in_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": {"b": {"text": "deep"}, "text": "shallow"}}')
    assert scan(path, text="a.b.text") == ["deep"]
    assert scan(path, text="a.text") == ["shallow"]


def test_a_property_below_a_null_parent_is_null(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "x", "meta": null}', '{"text": "x", "meta": {"language": "en"}}', '{"text": "x"}')
    spec = ScanSpec(text="text", properties=(LANGUAGE,))
    (batch, _) = JsonlFormat().scan(path, JsonlFormat().units(path, 200)[0], spec, 4)
    column = batch.columns["language"]
    assert not isinstance(column, np.ndarray)
    assert [column.values[c] for c in column.code] == [(), ("en",), ()]


def test_only_wanted_rows_are_read_again(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{i}" * 50_000}) for i in range(8)]
    path = write(tmp_path, *rows)
    ((block, lengths),) = read_blocks(scan_whole_shard(JsonlFormat(), path, ScanSpec(text="text")))
    # Destroy everything but rows 1 and 6: reading it would fail.
    with path.open("r+b") as file:
        for row in (0, 2, 3, 4, 5, 7):
            file.seek(int(lengths[:row].sum()))
            file.write(b"!" * int(lengths[row]))
    reader = JsonlFormat().open(path, "text", BlockCache())
    assert reader.documents(block, lengths, np.array([1, 6])) == ["1" * 50_000, "6" * 50_000]
    reader.close()


@pytest.mark.parametrize("damage", ["cut", "shift", "emptied"])
def test_a_shard_that_changed_is_refused_when_read(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, *[json.dumps({"text": f"text {i}"}) for i in range(4)])
    block = BlockRef(offset=0, length=path.stat().st_size, first_row=0, rows=4)
    lengths = np.full(4, block.length // 4)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:50], "shift": b"  " + content, "emptied": b""}[damage])
    reader = JsonlFormat().open(path, "text", BlockCache())
    for rows in ([0, 1, 2, 3], [1, 3]):
        with pytest.raises(DataError, match=r"has changed since it was indexed(.|\n)*index verify"):
            reader.documents(block, lengths, np.array(rows))
    reader.close()


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a", "a.b"], "looks inside 'a'"),
        (["a.b", "a"], "reads 'a' as another kind"),
        (["text"], "reads 'text' as another kind"),
        (["a..b"], "keys with dots between them"),
        ([""], "keys with dots between them"),
    ],
)
def test_contradicting_paths_are_refused(paths: list[str], message: str) -> None:
    properties = tuple(PropertyField(name=f"p{i}", path=p, kind=Kind.CATEGORY) for i, p in enumerate(paths))
    with pytest.raises(ConfigError, match=message):
        RowType(ScanSpec(text="text", properties=properties))


def test_two_properties_may_read_the_same_path(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "x", "meta": {"language": "en"}}')
    twin = PropertyField(name="twin", path="meta.language", kind=Kind.CATEGORY)
    assert scan(path, LANGUAGE, twin) == ["x"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL", "jsonl"),
        ("a.json.gz", "jsonl.gz"),
        ("x/b.jsonl.zst", "jsonl.zst"),
        ("c.parquet", "parquet"),
        ("d.json", "json"),
        ("d.csv", None),
        ("d.sidecar.jsonl", None),
        ("jsonl", None),
    ],
)
def test_the_ending_of_a_name_selects_the_format(name: str, expected: str | None) -> None:
    assert format_name_of(name) == expected


def test_an_unknown_format_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"data\.format is 'jsnl'.*Did you mean 'jsonl'"):
        load_format("jsnl")


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.7, 1.0])
def test_few_bytes_between_the_rows_are_read(density: float, tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(1))
    lines = [json.dumps({"text": f"{i} {'x' * size}"}) for i, size in enumerate(random.integers(100, 2000, 3000))]
    path = write(tmp_path, *lines)
    ends = np.cumsum([len(line) + 1 for line in lines])
    chosen = np.sort(random.choice(len(lines), int(density * len(lines)), replace=False))
    lengths = np.diff(ends, prepend=0)[chosen]
    reader = load_format("jsonl").open(path, "text", BlockCache())
    assert isinstance(reader, JsonRowReader)

    before = bytes_read()
    documents = reader.documents_at(ends[chosen] - lengths, lengths)
    # The file that counts is read as well, once.
    amplification = (bytes_read() - before - 200) / lengths.sum()
    reader.close()
    assert [int(document.split()[0]) for document in documents] == chosen.tolist()
    assert 0.95 < amplification <= 1.25


def bytes_read() -> int:
    """Return the bytes that system calls of this thread have read so far."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


def test_short_reads_of_many_rows_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i} {'y' * 300}" for i in range(200)]
    path = write(tmp_path, *(json.dumps({"text": text}) for text in texts))
    ends = np.cumsum([len(json.dumps({"text": text})) + 1 for text in texts])
    starts = np.concatenate([[0], ends[:-1]])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 50), offset))
    reader = JsonRowReader(path, "text")
    assert reader.documents_at(starts[::3], (ends - starts)[::3]) == texts[::3]
    reader.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    pread = os.pread
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    with path.open("rb") as file:
        assert read_fully(file.fileno(), 7, 2) == b"2345678"
        assert read_fully(file.fileno(), 7, 8) == b"89"
