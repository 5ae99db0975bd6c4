"""A small collection of real text: four formats, a tokenizer trained on it, and an index.

The text is the source code of Python's standard library.
"""

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
VOCAB_SIZE = 512
Row = dict[str, Any]


def make_collection(folder: Path, num_rows: int = 480) -> list[str]:
    """Write shards, tokenizer and index below `folder`; return the overrides that select them.

    Rows have four properties. `source` is a category with ten values of very different frequency, in irregular order;
    it names the module. `tags` is a category with several values per row. `size` is a number that is null in some rows.
    `meta.id` identifies the row and is not indexed.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    rows = list(_rows(num_rows))
    # One format per quarter of the rows.
    quarter = len(rows) // 4
    for i, write in enumerate((_write_jsonl, _write_gz, _write_zst, _write_parquet)):
        write(data, rows[i * quarter : (i + 1) * quarter])
    train_bpe((row["text"] for row in rows), VOCAB_SIZE, folder / "tokenizer.json")

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
    """Return the source code of a standard library module, split at empty lines."""
    source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
    return [paragraph for paragraph in source.split("\n\n") if paragraph.strip()]


def _rows(num_rows: int) -> Iterator[Row]:
    """Yield rows in which module k is half as frequent as module k - 1, in a fixed irregular order."""
    texts = {module: paragraphs(module) for module in MODULES}
    num_used = dict.fromkeys(MODULES, 0)
    for number in range(num_rows):
        # Multiplicative hashing: a pseudo-random word has k trailing zeros with probability 2^-(k+1).
        word = number * 2654435761 % 2**32 >> 8
        module = MODULES[min(_trailing_zeros(word), len(MODULES) - 1)]
        text = texts[module][num_used[module] % len(texts[module])]
        num_used[module] += 1
        yield {
            "text": text,
            "meta": {
                "id": number,
                "source": module,
                "tags": [tag for tag in ("def", "class", "return") if tag in text],
                "size": None if number % 13 == 0 else len(text),
            },
        }


def _trailing_zeros(word: int) -> int:
    return (word & -word).bit_length() - 1 if word else len(MODULES)


def _json_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write_jsonl(folder: Path, rows: Sequence[Row]) -> None:
    (folder / "a.jsonl").write_bytes(_json_lines(rows))


def _write_gz(folder: Path, rows: Sequence[Row]) -> None:
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_json_lines(rows), mtime=0))


def _write_zst(folder: Path, rows: Sequence[Row]) -> None:
    """Write several frames of whole lines."""
    import zstandard  # Optional: a user of the conformance suites need not have it.

    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(_json_lines(rows[i : i + 20])) for i in range(0, len(rows), 20)]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))


def _write_parquet(folder: Path, rows: Sequence[Row]) -> None:
    import pyarrow  # Optional, and slow to import.
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet", row_group_size=24)
