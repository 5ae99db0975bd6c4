"""Measure what each format costs: a scan per row, and the read of one row at random without any cache.

    python -m bench.formats

The same 20,000 rows of 1.1 kB are in one shard each, and the file is in the page cache; times are CPU times of this
process. A random read opens the shard and has nothing cached. Peers in the same run: `tarfile` walks the same tar, and
`gzip` seeks in the same .gz. Prints a table and writes bench/out/formats.json.
"""

import gzip
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from bench._corpus import make_rows
from mixtera_hpc.formats.base import BlockRef, Format, RowBatch, ScanSpec, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import read_blocks
from mixtera_hpc.testing.writers import (
    write_arrow,
    write_compressed,
    write_json,
    write_jsonl,
    write_mds_rows,
    write_parquet,
    write_tar,
    write_tokens,
)

OUT = Path(__file__).resolve().parent / "out" / "formats.json"
NUM_ROWS = 20_000
NUM_READS = 30
NUM_PEER_READS = 5
BLOCK_ROWS = 256
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
    "mds": ("mds", write_mds_rows),
    "megatron": ("megatron", write_tokens),
}
"""Name in the table → format name, and how the rows are written."""

Blocks = Sequence[tuple[BlockRef, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCost:
    """One line of the table."""

    stored: str
    size_mb: float
    scan_us_per_row: float
    read_ms: float
    peer: str = ""


def measure(stored: str, rows: list[dict[str, Any]], folder: Path) -> FormatCost:
    """Write the rows, scan them, and read some of them."""
    name, write = STORED[stored]
    fmt = load_format(name)
    (shard,) = write(folder, rows)
    spec = ScanSpec(text="txt" if name == "webdataset" else "text", seek_folder=str(folder / "seek"))

    batches: list[RowBatch] = []
    scan_s = cpu_s(lambda: batches.extend(_scan(fmt, shard, spec)))

    blocks = read_blocks(batches)
    chosen = np.random.Generator(np.random.Philox(0)).integers(0, len(blocks), NUM_READS).tolist()
    read_s = cpu_s(lambda: [_read_one(fmt, shard, spec, blocks[number]) for number in chosen])
    return FormatCost(
        stored=stored,
        size_mb=shard.stat().st_size / 1e6,
        scan_us_per_row=scan_s / len(rows) * 1e6,
        read_ms=read_s / NUM_READS * 1e3,
        peer=_measure_peer(stored, shard, blocks, chosen),
    )


def _scan(fmt: Format, shard: Path, spec: ScanSpec) -> list[RowBatch]:
    units = fmt.units(shard, shard.stat().st_size)
    return [batch for unit in units for batch in fmt.scan(shard, unit, spec, BLOCK_ROWS)]


def _read_one(fmt: Format, shard: Path, spec: ScanSpec, block_and_lengths: tuple[BlockRef, Any]) -> None:
    """Open the shard and read the row in the middle of a block."""
    block, lengths = block_and_lengths
    row = np.array([block.rows // 2])
    reader = fmt.open(shard, spec.text, BlockCache(seek_folders=[Path(spec.seek_folder or "")]))
    if fmt.holds_tokens:
        cast(TokenReader, reader).tokens(block, row)
    else:
        reader.documents(block, lengths, row)
    reader.close()


def _measure_peer(stored: str, shard: Path, blocks: Blocks, chosen: list[int]) -> str:
    """Measure the same work with the standard library."""
    if stored == "webdataset":
        with tarfile.open(shard) as archive:
            seconds = cpu_s(archive.getmembers)
        return f"tarfile, headers alone: {seconds / NUM_ROWS * 1e6:.1f} µs per row"

    if stored == "jsonl.gz, one member":

        def seek() -> None:
            for number in chosen[:NUM_PEER_READS]:
                with gzip.open(shard) as file:
                    file.seek(blocks[number][0].offset)
                    file.readline()

        return f"gzip.seek: {cpu_s(seek) / NUM_PEER_READS * 1e3:.0f} ms"
    return ""


def cpu_s(work: Callable[[], Any]) -> float:
    """Return the CPU seconds that this process needs for `work`."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure every format, print the table and write the JSON file."""
    lines = sorted(make_rows(NUM_ROWS).glob("*.jsonl"))[0].read_bytes()
    rows = [{"tags": [], **row} for row in msgspec.json.Decoder().decode_lines(lines)]
    costs = []
    print(f"{'':34}{'MB':>8}{'scan µs/row':>14}{'read ms':>10}  peer")
    for stored in STORED:
        with tempfile.TemporaryDirectory() as folder:
            cost = measure(stored, rows, Path(folder))
        costs.append(cost)
        numbers = f"{cost.size_mb:8.1f}{cost.scan_us_per_row:14.2f}{cost.read_ms:10.2f}"
        print(f"{stored:34}{numbers}  {cost.peer}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


if __name__ == "__main__":
    main()
