"""Every shipped format passes the shipped conformance suite."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mixtera_hpc.formats.registry import SUFFIXES, load_format
from mixtera_hpc.testing.format_cases import FormatCase
from mixtera_hpc.testing.formats import CHECKS
from mixtera_hpc.testing.writers import (
    PIXELS,
    json_lines,
    write_arrow,
    write_arrow_stream,
    write_compressed,
    write_json,
    write_jsonl,
    write_mds_rows,
    write_parquet,
    write_tar,
    write_text,
    write_tokens,
)

pytestmark = pytest.mark.slow
"""Every format passes every check, which takes some 10 CPU-seconds."""

Rows = Sequence[dict[str, Any]]


def write_frames_inside_lines(folder: Path, rows: Rows) -> list[Path]:
    data = b"".join(json_lines(rows))
    frames = [zstandard.compress(data[i : i + 1000]) for i in range(0, len(data), 1000)]
    (folder / "shard.jsonl.zst").write_bytes(b"".join(frames))
    return [folder / "shard.jsonl.zst"]


def compressed(ending: str, frame_rows: int | None = None) -> FormatCase:
    write = partial(write_compressed, ending=ending, frame_rows=frame_rows)
    return FormatCase(format=load_format(f"jsonl.{ending}"), write=write)


def sample(number: int, row: dict[str, Any]) -> dict[str, Any]:
    prefix = "long/" * 30 if number % 50 == 7 else ""
    key = f"{prefix}{number:06d}"
    rest = {name: value for name, value in row.items() if name != "text"}
    return {"__key__": key, "txt": row["text"], "json": rest, "jpg": PIXELS}


CASES = {
    "jsonl": FormatCase(format=load_format("jsonl"), write=write_jsonl),
    "json": FormatCase(format=load_format("json"), write=write_json),
    **{f"jsonl.{e}": compressed(e) for e in ("gz", "bz2", "xz", "zst")},
    **{f"jsonl.{e} of many frames": compressed(e, 37) for e in ("gz", "bz2", "xz", "zst")},
    "jsonl.zst with frames that end inside lines": FormatCase(
        format=load_format("jsonl.zst"), write=write_frames_inside_lines
    ),
    "parquet": FormatCase(format=load_format("parquet"), write=write_parquet),
    "arrow": FormatCase(format=load_format("arrow"), write=write_arrow),
    "arrow, compressed": FormatCase(format=load_format("arrow"), write=partial(write_arrow, compression="zstd")),
    "arrow, as a stream": FormatCase(format=load_format("arrow"), write=write_arrow_stream),
    "webdataset": FormatCase(
        format=load_format("webdataset"), write=write_tar, text="txt", below="json.", payload=sample
    ),
    "mds": FormatCase(format=load_format("mds"), write=write_mds_rows),
    "mds, compressed": FormatCase(format=load_format("mds"), write=partial(write_mds_rows, compression="zstd")),
    "text": FormatCase(
        format=load_format("text"),
        write=write_text,
        has_properties=False,
        texts_may_be_empty=False,
        payload=lambda _, row: {"text": row["text"]},
    ),
    "megatron": FormatCase(
        format=load_format("megatron"),
        write=write_tokens,
        text=None,
        encode=str.encode,
        payload=lambda _, row: {"tokens": list(row["text"].encode())},
    ),
    "megatron of int32": FormatCase(
        format=load_format("megatron"),
        write=partial(write_tokens, dtype="<i4"),
        text=None,
        encode=str.encode,
        payload=lambda _, row: {"tokens": list(row["text"].encode())},
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", CASES)
def test_every_format_conforms_to_its_protocol(
    kind: str, check: Callable[[FormatCase, Path], None], tmp_path: Path
) -> None:
    check(CASES[kind], tmp_path)


def test_every_format_is_tested() -> None:
    assert {case.format.name for case in CASES.values()} == set(SUFFIXES.values())
