"""Write the same rows, `{"text": …, "meta": …, "tags": …}`, in every format: one shard, or for plain text one per row.

A row whose text is None is written so that it cannot be read, in the way of each format.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.testing.mds import write_mds
from mixtera_hpc.testing.megatron import write_megatron

__all__ = [
    "PIXELS",
    "json_lines",
    "write_arrow",
    "write_arrow_stream",
    "write_compressed",
    "write_json",
    "write_jsonl",
    "write_mds_rows",
    "write_parquet",
    "write_tar",
    "write_text",
    "write_tokens",
]

Row = dict[str, Any]
Compress = Callable[[bytes], bytes]
PIXELS = bytes(range(256)) * 3
"""Bytes that take the place of an image."""
UNKNOWN_ID = 65535
"""Token id that takes the place of an unreadable text."""


def json_lines(rows: Sequence[Row]) -> list[bytes]:
    """Return every row as a line of JSON."""
    return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]


def write_jsonl(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write uncompressed JSON lines."""
    return _write(folder / "shard.jsonl", b"".join(json_lines(rows)))


def write_json(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write one JSON array."""
    return _write(folder / "shard.json", json.dumps(list(rows), ensure_ascii=False, indent=1).encode())


def write_compressed(folder: Path, rows: Sequence[Row], ending: str, frame_rows: int | None = None) -> list[Path]:
    """Write compressed JSON lines.

    Args:
        folder: where to write.
        rows: the rows.
        ending: `gz`, `bz2`, `xz` or `zst`.
        frame_rows: rows per compressed frame; None for one frame.
    """
    lines = json_lines(rows)
    step = frame_rows or max(len(rows), 1)
    compress = _compressor(ending)
    frames = [compress(b"".join(lines[i : i + step])) for i in range(0, max(len(rows), 1), step)]
    return _write(folder / f"shard.jsonl.{ending}", b"".join(frames))


def _compressor(ending: str) -> Compress:
    if ending == "zst":
        import zstandard  # Imported only where it is needed, like pyarrow below.

        return zstandard.ZstdCompressor().compress
    compressors: dict[str, Compress] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    return compressors[ending]


def write_parquet(folder: Path, rows: Sequence[Row], group_rows: int = 97) -> list[Path]:
    """Write Parquet with row groups of `group_rows` rows."""
    import pyarrow.parquet  # Heavy: it is imported by the functions that write Arrow tables only.

    path = folder / "shard.parquet"
    pyarrow.parquet.write_table(_table(rows), path, row_group_size=group_rows)
    return [path]


def write_arrow(folder: Path, rows: Sequence[Row], batch_rows: int = 97, compression: str | None = None) -> list[Path]:
    """Write Arrow's file format."""
    import pyarrow

    path = folder / "shard.arrow"
    table = _table(rows)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(str(path), table.schema, options=options) as file:
        file.write_table(table, max_chunksize=batch_rows)
    return [path]


def write_arrow_stream(folder: Path, rows: Sequence[Row], batch_rows: int = 97) -> list[Path]:
    """Write Arrow's stream format, as Hugging Face `datasets` does."""
    import pyarrow

    path = folder / "shard.arrow"
    table = _table(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=batch_rows)
    return [path]


def _table(rows: Sequence[Row]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(list(rows))


def write_tar(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write a WebDataset of `txt`, `json` and `jpg` members, with folders and long names in between."""
    path = folder / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, row in enumerate(rows):
            prefix = "long/" * 30 if number % 50 == 7 else ""
            key = f"{prefix}{number:06d}"
            if number % 20 == 0:
                archive.addfile(_folder(f"part{number}"))
            if row["text"] is not None:
                _add_member(archive, f"{key}.txt", row["text"].encode())
            _add_member(archive, f"{key}.json", json.dumps(_without_text(row), ensure_ascii=False).encode())
            _add_member(archive, f"{key}.jpg", PIXELS)
    return [path]


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_text(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write one file per row; the names sort like the rows."""
    paths = []
    for number, row in enumerate(rows):
        data = b"\xff" if row["text"] is None else row["text"].encode()
        paths += _write(folder / f"{number:06d}.txt", data)
    return paths


def write_mds_rows(folder: Path, rows: Sequence[Row], compression: str | None = None) -> list[Path]:
    """Write an MDS shard with its `index.json`; texts as `str`, everything else as `json`."""
    encodings = {name: "str" if name == "text" else "json" for name in rows[0]} if rows else {"text": "str"}
    samples = [{name: _mds_value(name, value) for name, value in row.items()} for row in rows]
    return write_mds(folder, encodings, [samples], compression)


def _mds_value(name: str, value: Any) -> bytes:
    if name == "text":
        return b"\xff" if value is None else str(value).encode()
    return json.dumps(value, ensure_ascii=False).encode()


def write_tokens(
    folder: Path, rows: Sequence[Row], encode: Callable[[str], Any] = str.encode, dtype: str = "<u2"
) -> list[Path]:
    """Write a Megatron file of token ids, and a sidecar with the other keys of the rows."""
    path = folder / "shard.bin"
    documents = [[UNKNOWN_ID] if row["text"] is None else list(encode(row["text"])) for row in rows]
    write_megatron(path, documents, dtype)
    properties = [_without_text(row) for row in rows]
    _write(folder / "shard.sidecar.jsonl", b"".join(json_lines(properties)))
    return [path]


def _without_text(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "text"}


def _write(path: Path, data: bytes) -> list[Path]:
    path.write_bytes(data)
    return [path]
