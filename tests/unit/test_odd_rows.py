"""Rows with one fault, also in fields that no setting names: fault × format × {build, verify, query, run, samples}."""

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

Answers = Callable[..., dict[str, str]]
ROWS = [b'{"text": "row %d", "s": "a"}' % i for i in range(4)]
BOM = codecs.BOM_UTF8


def archive(rows: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, row in enumerate(rows):
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(row)
            tar.addfile(info, io.BytesIO(row))
    return buffer.getvalue()


def lines(rows: list[bytes]) -> bytes:
    return b"\n".join(rows) + b"\n"


# Ending → the file of some rows.
FORMATS: dict[str, Callable[[list[bytes]], bytes]] = {
    "jsonl": lines,
    "json": lambda rows: b"[" + b",\n".join(rows) + b"]",
    "jsonl.gz": lambda rows: b"".join(gzip.compress(lines(rows[i : i + 2])) for i in range(0, len(rows), 2)),
    "jsonl.zst": lambda rows: zstandard.compress(lines(rows)),
    "jsonl.bz2": lambda rows: bz2.compress(lines(rows)),
    "jsonl.xz": lambda rows: lzma.compress(lines(rows)),
    "tar": archive,
}
# Fault → the bad row, and what the message says.
FAULTS: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"text": "x", "v": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    "a key that is not UTF-8": (b'{"text": "x", "\xff": 1}', "'utf-8' codec can't decode byte 0xff"),
    "NaN": (b'{"text": "x", "v": NaN}', "invalid character (byte 19): NaN is not JSON"),
    "-Infinity": (b'{"text": "x", "v": -Infinity}', "Infinity is not JSON"),
    "a lone surrogate": (rb'{"text": "x", "v": "a\ud83d"}', r"a lone surrogate \ud83d, half of a character (byte 21)"),
    "a lone low surrogate": (rb'{"text": "x", "v": "\\ud83d\udc00"}', r"a lone surrogate \udc00"),
    "a lone surrogate in a property": (rb'{"text": "x", "s": "a\ud83d"}', r"a lone surrogate \ud83d"),
    "a lone surrogate in the text": (rb'{"text": "\ud83d\ud83d\ude00"}', r"a lone surrogate \ud83d"),
    "an unknown escape": (rb'{"text": "x", "v": "\q"}', "escape"),
    "a missing comma": (b'{"text": "x" "v": 1}', "JSON is malformed"),
    "another type": (b"7", "Expected `object`, got `int`"),
}


def ask(answers: Answers, ending: str, on_bad_sample: str = "fail") -> dict[str, str]:
    prefix = "json." if ending == "tar" else ""
    properties = {"s": f"{prefix}s"}
    include = [f"*.{ending}"]
    return answers(f"{prefix}text", include=include, properties=properties, on_bad_sample=on_bad_sample)


def put(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / f"data/a.{ending}").write_bytes(content)


def faults_of_formats() -> Iterator[Any]:
    """Return every fault in every format. Compressed lines are decoded like plain ones: one fault shows that."""
    for fault in FAULTS:
        for ending in FORMATS:
            further = ending.startswith("jsonl.") and fault != "invalid UTF-8"
            yield pytest.param(fault, ending, marks=pytest.mark.full if further else [], id=f"{fault}-{ending}")


@pytest.mark.parametrize(("fault", "ending"), list(faults_of_formats()))
def test_a_bad_row_is_named_or_skipped_alone(fault: str, ending: str, tmp_path: Path, answers: Answers) -> None:
    row, message = FAULTS[fault]
    # A member of an archive may be any JSON; it has no text then.
    message = "no text at 'json.text'" if (fault, ending) == ("another type", "tar") else message
    put(tmp_path, ending, FORMATS[ending]([ROWS[0], row, *ROWS[1:]]))
    refused = ask(answers, ending)["build"]
    assert "row=1: " in refused and message in refused
    assert "row=2" not in refused and "row=0" not in refused
    assert ask(answers, ending, "skip") == {
        "build": "4 samples, 1 bad rows, 0 damaged",
        "tokens": "20",
        "verify": "fresh",
        "query": "4 samples",
        "run": "5 served",
        "samples": "4 served",
    }


@pytest.mark.parametrize("ending", FORMATS)
def test_a_number_beyond_every_float_is_no_fault(ending: str, tmp_path: Path, answers: Answers) -> None:
    put(tmp_path, ending, FORMATS[ending]([*ROWS[:3], b'{"text": "row 3", "v": 1e400}']))
    assert ask(answers, ending)["samples"] == "4 served"


@pytest.mark.parametrize("ending", FORMATS)
def test_a_byte_order_mark_at_the_start_is_ignored(ending: str, tmp_path: Path, answers: Answers) -> None:
    put(tmp_path, ending, FORMATS[ending](ROWS))
    plain = ask(answers, ending)
    marked = {
        "json": BOM + FORMATS["json"](ROWS),
        "tar": archive([BOM + row for row in ROWS]),
    }
    put(tmp_path, ending, marked.get(ending, FORMATS[ending]([BOM + ROWS[0], *ROWS[1:]])))
    assert ask(answers, ending) == plain
    assert plain["samples"] == "4 served"


@pytest.mark.parametrize("ending", sorted(FORMATS.keys() - {"json", "tar"}))
def test_a_byte_order_mark_elsewhere_is_named(ending: str, tmp_path: Path, answers: Answers) -> None:
    put(tmp_path, ending, FORMATS[ending]([BOM + ROWS[0], ROWS[1], BOM + ROWS[2], ROWS[3]]))
    refused = ask(answers, ending)["build"]
    assert "row=2: " in refused and "it begins with a byte order mark" in refused and "row=0" not in refused
    assert ask(answers, ending, "skip")["samples"] == "3 served"


def test_a_byte_order_mark_of_plain_text_is_no_token(tmp_path: Path, answers: Answers) -> None:
    counts = []
    for content in (b"some text", BOM + b"some text"):
        put(tmp_path, "txt", content)
        counts.append(answers(include=["*.txt"]))
    assert counts[0] == counts[1] and counts[0]["tokens"] == "9"


@pytest.mark.parametrize(
    ("member", "content"), [("json", b'{"v": NaN}'), ("json", b'{"v": "\xff"}'), ("txt", b"caf\xe9"), ("cls", b"\xff")]
)
def test_members_that_no_setting_names_are_checked(
    member: str, content: bytes, tmp_path: Path, answers: Answers
) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/a.tar", "w") as tar:
        for name, data in (("0.png", b"\xff"), ("1.png", b"\xff"), (f"1.{member}", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert f"row=1: member 1.{member}: " in answers(None)["build"]
    skipped = answers(None, on_bad_sample="skip")
    assert (skipped["build"], skipped["samples"]) == ("1 samples, 1 bad rows, 0 damaged", "1 served")


def tables(rows: int, bad: int) -> pa.Table:
    """Return a table with columns that no setting names, of which one row is not UTF-8."""
    raw = [b"\xff" if i == bad else b"x" for i in range(rows)]
    offsets = pa.array(np.arange(rows + 1), pa.int32())
    texts = pa.array(raw, pa.binary()).view(pa.string())
    nested = pa.StructArray.from_arrays([pa.ListArray.from_arrays(offsets, texts)], ["names"])
    return pa.table({"text": ["a row"] * rows, "flat": texts, "nested": nested, "image": pa.array(raw, pa.binary())})


# Arrow validates nested columns while it maps a batch, and refuses the whole batch.
@pytest.mark.parametrize(("ending", "column"), [("parquet", "flat"), ("parquet", "nested"), ("arrow", "flat")])
def test_a_column_that_no_setting_names_is_checked_for_whole_rows(
    ending: str, column: str, tmp_path: Path, answers: Answers
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / f"data/a.{ending}"
    table = tables(9, bad=5).drop_columns(["nested" if column == "flat" else "flat"])
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    # Only texts are decoded with unit=tokens.
    unaware = answers()
    assert (unaware["build"], unaware["run"]) == ("9 samples, 0 bad rows, 0 damaged", "13 served")
    assert "row 5 cannot be decoded as a whole" in unaware["samples"] and "changed" not in unaware["samples"]
    assert f"row=5: column {column!r} is not valid UTF-8" in answers(unit="samples")["build"]
    for text in ("text", None):
        skipped = answers(text, unit="samples", on_bad_sample="skip")
        assert skipped["build"] == "8 samples, 1 bad rows, 0 damaged"
        assert (skipped["verify"], skipped["samples"]) == ("fresh", "8 served")


def test_the_rows_before_an_array_ends_too_early_are_kept(tmp_path: Path, answers: Answers) -> None:
    put(tmp_path, "json", FORMATS["json"](ROWS)[:-9])
    refused = ask(answers, "json")["build"]
    assert (
        "is not a JSON array of rows: Input data was truncated; row 3, which begins at byte 87, does not end" in refused
    )
    skipped = ask(answers, "json", "skip")
    assert (skipped["build"], skipped["samples"]) == ("3 samples, 0 bad rows, 1 damaged", "3 served")
