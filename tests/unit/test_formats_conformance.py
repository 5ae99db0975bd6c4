"""Every shipped format passes the shipped conformance suite."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.formats import CHECKS, Write


def lines(rows: Sequence[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(lines(rows)))


def write_gz(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress(b"".join(lines(rows))))


def write_zst(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_bytes(zstandard.compress(b"".join(lines(rows))))


def write_zst_frames(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    encoded = lines(rows)
    path.write_bytes(b"".join(zstandard.compress(b"".join(encoded[i : i + 37])) for i in range(0, len(rows), 37)))


def write_zst_frames_mid_line(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    data = b"".join(lines(rows))
    path.write_bytes(b"".join(zstandard.compress(data[i : i + 1000]) for i in range(0, len(data), 1000)))


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=97)


WRITERS: dict[str, tuple[str, Write]] = {
    "jsonl": ("jsonl", write_jsonl),
    "jsonl.gz": ("jsonl.gz", write_gz),
    "jsonl.zst": ("jsonl.zst", write_zst),
    "jsonl.zst of many frames": ("jsonl.zst", write_zst_frames),
    "jsonl.zst cut anywhere": ("jsonl.zst", write_zst_frames_mid_line),
    "parquet": ("parquet", write_parquet),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", WRITERS)
def test_format_conforms(kind: str, check: Callable[..., None], tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    check(load_format(name), write, tmp_path)
