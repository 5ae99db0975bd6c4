"""A small real collection: text of the standard library in four formats, a tokenizer trained on it, an index of both."""

import gzip
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.tokens.bpe_training import train_bpe

__all__ = ["make_collection", "paragraphs"]

MODULES = ("argparse", "ast", "difflib", "enum", "inspect", "ipaddress", "optparse", "pathlib", "statistics", "tarfile")


def make_collection(folder: Path, num_rows: int = 480) -> list[str]:
    """Write shards, tokenizer and index below `folder`; returns the overrides that name them.

    The property `source` (the module, a category) takes ten values of very unequal frequency and alternates row by row; `tags`
    has several values, `size` is a number and null in some rows. `meta.id` tells rows apart.
    """
    rows = list(_rows(num_rows))
    data = folder / "data"
    data.mkdir(parents=True)
    quarter = len(rows) // 4
    for write, start in zip((_jsonl, _gz, _zst, _parquet), range(0, len(rows), quarter), strict=False):
        write(data, rows[start : start + quarter])
    train_bpe((row["text"] for row in rows), 512, folder / "tokenizer.json")
    overrides = [
        f"data.root={data}",
        "data.properties.source=meta.source",
        "data.properties.tags={path:meta.tags,kind:categories}",
        "data.properties.size={path:meta.size,kind:number}",
        f"index.path={folder / 'index.h5'}",
        "index.block_rows=16",
        f"dataplane.tokenizer={folder / 'tokenizer.json'}",
        "mixture.group_by=[source]",
    ]
    build_index(compose(overrides))
    return overrides


def paragraphs(module: str) -> list[str]:
    """The source of a standard library module, cut at empty lines."""
    source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
    return [part for part in source.split("\n\n") if part.strip()]


def _rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Module k comes half as often as module k - 1, in a fixed irregular order."""
    texts = {module: paragraphs(module) for module in MODULES}
    taken = dict.fromkeys(MODULES, 0)
    for number in range(num_rows):
        word = number * 2654435761 % 2**32 >> 8
        module = MODULES[min(_trailing_zeros(word), len(MODULES) - 1)]
        text = texts[module][taken[module] % len(texts[module])]
        taken[module] += 1
        meta = {"id": number, "source": module, "tags": [t for t in ("def", "class", "return") if t in text]}
        yield {"text": text, "meta": meta | {"size": None if number % 13 == 0 else len(text)}}


def _trailing_zeros(word: int) -> int:
    return (word & -word).bit_length() - 1 if word else len(MODULES)


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _jsonl(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "a.jsonl").write_bytes(_lines(rows))


def _gz(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_lines(rows), mtime=0))


def _zst(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Several frames that end with a line."""
    import zstandard

    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(_lines(rows[i : i + 20])) for i in range(0, len(rows), 20)]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))


def _parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet", row_group_size=24)
