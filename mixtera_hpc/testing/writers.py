"""The same rows, `{"text": …, "meta": …, "tags": …}`, written in every format: one shard, or for plain text one per row.

Rows whose text is None are written so that they cannot be read, each format in its own way.
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

from mixtera_hpc.testing.megatron import write_megatron

__all__ = [
    "PIXELS",
    "json_lines",
    "write_arrow",
    "write_arrow_stream",
    "write_compressed",
    "write_json",
    "write_jsonl",
    "write_parquet",
    "write_tar",
    "write_text",
    "write_tokens",
]

Row = dict[str, Any]
Compress = Callable[[bytes], bytes]
PIXELS = bytes(range(256)) * 3
"""What stands for an image."""


def json_lines(rows: Sequence[Row]) -> list[bytes]:
    """Every row as a line."""
    return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]


def write_jsonl(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Uncompressed."""
    return _written(folder / "shard.jsonl", b"".join(json_lines(rows)))


def write_json(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """One array."""
    return _written(folder / "shard.json", json.dumps(list(rows), ensure_ascii=False, indent=1).encode())


def write_compressed(folder: Path, rows: Sequence[Row], ending: str, frame_rows: int | None = None) -> list[Path]:
    """Compressed by `ending`: `gz`, `bz2`, `xz` or `zst`; a frame per `frame_rows` rows, or one in all."""
    lines, step = json_lines(rows), frame_rows or max(len(rows), 1)
    frames = [b"".join(lines[i : i + step]) for i in range(0, max(len(rows), 1), step)]
    return _written(folder / f"shard.jsonl.{ending}", b"".join(map(_compressor(ending), frames)))


def _compressor(ending: str) -> Compress:
    if ending == "zst":
        import zstandard

        return zstandard.ZstdCompressor().compress
    known: dict[str, Compress] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    return known[ending]


def write_parquet(folder: Path, rows: Sequence[Row], group_rows: int = 97) -> list[Path]:
    """Row groups of `group_rows`."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(_table(rows), folder / "shard.parquet", row_group_size=group_rows)
    return [folder / "shard.parquet"]


def write_arrow(folder: Path, rows: Sequence[Row], batch_rows: int = 97, compression: str | None = None) -> list[Path]:
    """Arrow's file format."""
    import pyarrow

    table, options = _table(rows), pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(str(folder / "shard.arrow"), table.schema, options=options) as file:
        file.write_table(table, max_chunksize=batch_rows)
    return [folder / "shard.arrow"]


def write_arrow_stream(folder: Path, rows: Sequence[Row], batch_rows: int = 97) -> list[Path]:
    """Arrow's stream format, as Hugging Face `datasets` has it."""
    import pyarrow

    table = _table(rows)
    with pyarrow.ipc.new_stream(str(folder / "shard.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=batch_rows)
    return [folder / "shard.arrow"]


def _table(rows: Sequence[Row]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(list(rows))


def write_tar(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A WebDataset of `txt`, `json` and `jpg` members; folders and long names in between."""
    with tarfile.open(folder / "shard.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for number, row in enumerate(rows):
            key = f"{'long/' * 30 if number % 50 == 7 else ''}{number:06d}"
            if number % 20 == 0:
                archive.addfile(_folder(f"part{number}"))
            rest = {name: value for name, value in row.items() if name != "text"}
            if row["text"] is not None:
                _add(archive, f"{key}.txt", row["text"].encode())
            _add(archive, f"{key}.json", json.dumps(rest, ensure_ascii=False).encode())
            _add(archive, f"{key}.jpg", PIXELS)
    return [folder / "shard.tar"]


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_text(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A file per row, named so that their order is that of the rows."""
    return [
        path
        for number, row in enumerate(rows)
        for path in _written(folder / f"{number:06d}.txt", b"\xff" if row["text"] is None else row["text"].encode())
    ]


def write_tokens(
    folder: Path, rows: Sequence[Row], encode: Callable[[str], Any] = str.encode, dtype: str = "<u2"
) -> list[Path]:
    """A Megatron file of what `encode` makes of the texts, and its sidecar; 65535 stands for what cannot be read."""
    documents = [[65535] if row["text"] is None else list(encode(row["text"])) for row in rows]
    write_megatron(folder / "shard.bin", documents, dtype)
    rest = [{name: value for name, value in row.items() if name != "text"} for row in rows]
    _written(folder / "shard.sidecar.jsonl", b"".join(json_lines(rest)))
    return [folder / "shard.bin"]


def _written(path: Path, data: bytes) -> list[Path]:
    path.write_bytes(data)
    return [path]
