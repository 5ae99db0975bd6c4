"""What each format costs: to scan per row, and to read one row at random out of a shard that nobody has touched.

    python -m bench.formats

The same 20,000 rows of 1.1 kB in one shard each, the file in the page cache; CPU time of this process. A random read opens the
shard and has nothing cached. Peers in the same run: `tarfile` walking the same tar, and `gzip` seeking in the same .gz. Prints a table
and writes bench/out/formats.json.
"""

import gzip
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from bench._corpus import make_rows
from mixtera_hpc.formats.base import Format, ScanSpec, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.formats import read_blocks
from mixtera_hpc.testing.writers import (
    write_arrow,
    write_compressed,
    write_json,
    write_jsonl,
    write_parquet,
    write_tar,
    write_tokens,
)

OUT = Path(__file__).resolve().parent / "out" / "formats.json"
NUM_ROWS, NUM_READS, BLOCK_ROWS = 20_000, 30, 256
STORED: dict[str, tuple[str, Callable[..., list[Path]]]] = {
    "jsonl": ("jsonl", write_jsonl),
    "json": ("json", write_json),
    "jsonl.gz, one member": ("jsonl.gz", partial(write_compressed, ending="gz")),
    "jsonl.gz, a member per 256 rows": ("jsonl.gz", partial(write_compressed, ending="gz", frame_rows=256)),
    "jsonl.zst, one frame": ("jsonl.zst", partial(write_compressed, ending="zst")),
    "jsonl.zst, a frame per 256 rows": ("jsonl.zst", partial(write_compressed, ending="zst", frame_rows=256)),
    "jsonl.bz2, a stream per 256 rows": ("jsonl.bz2", partial(write_compressed, ending="bz2", frame_rows=256)),
    "jsonl.xz, a stream per 256 rows": ("jsonl.xz", partial(write_compressed, ending="xz", frame_rows=256)),
    "parquet, groups of 1000": ("parquet", partial(write_parquet, group_rows=1000)),
    "arrow, batches of 1000": ("arrow", partial(write_arrow, batch_rows=1000)),
    "webdataset": ("webdataset", write_tar),
    "megatron": ("megatron", write_tokens),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement."""

    stored: str
    size_mb: float
    scan_us_per_row: float
    read_ms: float
    peer: str = ""


def measure(stored: str, rows: list[dict[str, Any]], folder: Path) -> Row:
    """Write the rows, scan them, read some."""
    name, write = STORED[stored]
    fmt, (shard,) = load_format(name), write(folder, rows)
    fields = ScanSpec(text="txt" if name == "webdataset" else "text", seek_folder=str(folder / "seek"))
    scanned: list[Any] = []
    scan_s = cpu_s(lambda: scanned.extend(_scan(fmt, shard, fields)))
    blocks = read_blocks(scanned)
    chosen = np.random.Generator(np.random.Philox(0)).integers(0, len(blocks), NUM_READS).tolist()

    def read() -> None:
        for number in chosen:
            block, lengths = blocks[number]
            reader = fmt.open(shard, fields.text, BlockCache(seek_folders=[folder / "seek"]))
            if fmt.holds_tokens:
                cast(TokenReader, reader).tokens(block, np.array([block.rows // 2]))
            else:
                reader.documents(block, lengths, np.array([block.rows // 2]))
            reader.close()

    read_ms = cpu_s(read) / NUM_READS * 1e3
    return Row(
        stored=stored,
        size_mb=shard.stat().st_size / 1e6,
        scan_us_per_row=scan_s / len(rows) * 1e6,
        read_ms=read_ms,
        peer=_peer(stored, shard, blocks, chosen),
    )


def _scan(fmt: Format, shard: Path, fields: ScanSpec) -> list[Any]:
    units = fmt.units(shard, shard.stat().st_size)
    return [batch for unit in units for batch in fmt.scan(shard, unit, fields, BLOCK_ROWS)]


def _peer(stored: str, shard: Path, blocks: list[Any], chosen: list[int]) -> str:
    """The same with the standard library."""
    if stored == "webdataset":
        with tarfile.open(shard) as archive:
            seconds = cpu_s(lambda: archive.getmembers())
        return f"tarfile, headers alone: {seconds / NUM_ROWS * 1e6:.1f} µs per row"
    if stored == "jsonl.gz, one member":

        def seek() -> None:
            for number in chosen[:5]:
                with gzip.open(shard) as file:
                    file.seek(blocks[number][0].offset)
                    file.readline()

        return f"gzip.seek: {cpu_s(seek) / 5 * 1e3:.0f} ms"
    return ""


def cpu_s(do: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    do()
    return time.process_time() - began


def main() -> None:
    """Measure every format."""
    lines = sorted(make_rows(NUM_ROWS).glob("*.jsonl"))[0].read_bytes()
    rows = [{"tags": [], **row} for row in msgspec.json.Decoder().decode_lines(lines)]
    found = []
    print(f"{'':34}{'MB':>8}{'scan µs/row':>14}{'read ms':>10}  peer")
    for stored in STORED:
        with tempfile.TemporaryDirectory() as folder:
            found.append(row := measure(stored, rows, Path(folder)))
        print(
            f"{row.stored:34}{row.size_mb:8.1f}{row.scan_us_per_row:14.2f}{row.read_ms:10.2f}  {row.peer}", flush=True
        )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
