"""Shuffled reading of files that can only be decoded in large units, against streaming them with a shuffle buffer.

    python -m bench compressed
    python -m bench.compressed --shards 130 --shard-mb 41 --only gz

Seven domains in SlimPajama's proportions alternate line by line. Every layout of the same rows is read by a data plane
for one epoch. Shards, frames, row groups, windows and the cache are smaller than usual by one factor, which is 1 for
shards of 41 MB, so the memory has as many units as 2 GiB have units of 41 MB. *Amplification* is the bytes decoded per
byte served; for tar archives, whose samples are read one by one, the bytes read. With `--speeds`, weights are the
square roots of the shares: each domain then decodes for itself, and the lower bound is the sum over domains of weight /
share. Of a job of many ranks, the four ranks of one node are measured together. They share decoded blocks, and every
rank has 64 samples of a step. All rows are CPU seconds of one run on one core. Prints a table and writes
bench/out/compressed.json.
"""

import argparse
import gzip
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path

import msgspec
import zstandard

from bench._corpus import FOLDER, make_once, make_rows, zst_frames
from bench._results import write_results
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading import lane_count
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.processes.block_memory import share_blocks
from mixtera_hpc.dataplane.reading.processes.reader_memory import ReaderMemory
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

BUFFER_ROWS = 10_000
LOCAL_BATCH = 64
"""Samples per rank and step, whatever the number of ranks."""
RANKS_PER_NODE = 4
FRAME_ROWS = 256
UNIT_MB = 41
"""Decoded size of a shard of SlimPajama."""
CASES = ((1, None), (4, None), (16, None), (64, None), (16, 16), (64, 16), (1, 64), (4, 64), (64, 64))
"""Ranks, and lanes that differ from the default, which are measured with single frames and frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCost:
    """One layout, read by the ranks of one node of several."""

    layout: str
    ranks: int
    lanes: int
    rows: int
    rows_per_cpu_s: float
    amplification: float
    lower_bound: float
    first_batch_s: float
    """CPU seconds until the first batch."""


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=520)
    parser.add_argument("--shard-mb", type=float, default=1)
    parser.add_argument("--only", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--cache-mb", type=float, default=0, help="0: 2 GiB, scaled")
    parser.add_argument("--speeds", action="store_true", help="weights that differ from the shares")
    parser.add_argument("--max-rows", type=int, default=10**9)
    arguments = parser.parse_args(options)
    rows_per_shard = int(arguments.shard_mb * 1e6 / 1100)
    source_rows = make_rows(arguments.shards * rows_per_shard)
    scale = min(arguments.shard_mb / UNIT_MB, 1)
    # The default number of lanes is bounded by memory, too.
    lane_count.MAX_WINDOW_BYTES = int(lane_count.MAX_WINDOW_BYTES * scale)
    cache_mb = arguments.cache_mb or (2 << 30) * scale / 1e6

    costs = []
    for layout in arguments.only:
        folder = make_layout(layout, source_rows, rows_per_shard, scale)
        for ranks, lanes in CASES if layout in ("zst", "frames") else CASES[:1]:
            job = JobCase(ranks=ranks, lanes=lanes, scale=scale, has_own_speeds=arguments.speeds)
            costs.append(measure(layout, folder, job, int(cache_mb * 1e6), arguments.max_rows))
            print_cost(costs[-1])
    streaming = stream_with_buffer(sorted(make_layout("zst", source_rows, rows_per_shard, scale).glob("*.zst")))
    print(f"streaming decode and a shuffle buffer of {BUFFER_ROWS:,} rows: {streaming:,.0f} rows per CPU-s")
    write_results("compressed", {"costs": [asdict(cost) for cost in costs], "streaming_rows_per_cpu_s": streaming})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCase:
    """A job whose middle node is measured."""

    ranks: int
    lanes: int | None
    """Number of lanes; None for the default of the global batch and the data."""
    scale: float
    """Size of windows and units to those of shards of 41 MB."""
    has_own_speeds: bool
    """True if weights are the square roots of the shares, so that domains move at different speeds."""


def measure(layout: str, folder: Path, job: JobCase, cache_bytes: int, max_rows: int) -> ReadCost:
    """Read one epoch as all ranks of the node in the middle, which take turns."""
    config = config_of(folder, job, cache_bytes)
    per_node = min(RANKS_PER_NODE, job.ranks)
    source = open_source(config, Local())
    memory = share_blocks(Local(), config, source.index.shard_formats, per_node)
    source = replace(source, memory=ReaderMemory(num_readers=per_node, blocks=memory))
    first_rank = job.ranks // 2 // per_node * per_node
    slices = [BatchSlice(group=first_rank + number, num_groups=job.ranks) for number in range(per_node)]
    makers = [BatchMaker(source, of_rank, audit=False) for of_rank in slices]
    started = time.process_time()
    read_before = _bytes_read()
    first_batch_s = 0.0
    rows = served = 0
    for payloads in chain.from_iterable(zip(*(epoch(source, maker) for maker in makers), strict=True)):
        rows += len(payloads)
        first_batch_s = first_batch_s or time.process_time() - started
        served += sum(len(_text_of(row)) + 60 for row in payloads if row is not None)
        if rows >= max_rows:
            break
    seconds = time.process_time() - started
    decoded = float(sum(maker._reader._rows._cache.loaded_bytes for maker in makers))
    if layout == "tar":
        # Nothing is decoded; the members of a sample are read, with their headers.
        decoded = float(_bytes_read() - read_before)
        served = int(source.blocks.length.sum() * rows / source.blocks.rows.sum())
    for maker in makers:
        maker.close()
    shares = source.layout.epoch_items() / source.layout.epoch_items().sum()
    return ReadCost(
        layout=layout,
        ranks=job.ranks,
        lanes=source.lanes.lanes,
        rows=rows,
        rows_per_cpu_s=rows / seconds,
        amplification=decoded / served,
        # Domains with their natural weights pass through the shards together.
        lower_bound=float((source.weights / shares).sum()) if job.has_own_speeds else 1.0,
        first_batch_s=first_batch_s,
    )


def _bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _text_of(row: dict) -> str:
    """Return the text of a sample; a sample of a tar archive has it in its `json` member."""
    text: str = row.get("json", row)["text"]
    return text


def config_of(folder: Path, job: JobCase, cache_bytes: int) -> Config:
    """Return the configuration of one layout; build its index if there is none."""
    config = compose(
        [
            f"data.root={folder}",
            f"data.cache_bytes={cache_bytes}",
            "data.properties.source=meta.redpajama_set_name"
            if not any(folder.glob("*.tar"))
            else "data.properties.source=json.meta.redpajama_set_name",
            "data.text=null",
            "data.materialize=never",
            f"index.path={folder}.h5",
            "mixture.unit=samples",
            "mixture.group_by=[source]",
            *(["mixture.temperature=2"] if job.has_own_speeds else []),
            "mixture.on_exhausted=redistribute",
            "mixture.max_epochs=1",
            *([] if job.lanes is None else [f"dataplane.lanes={job.lanes}"]),
            f"dataplane.window_bytes={int((1 << 23) * job.scale)}",
            f"dataplane.global_batch_size={LOCAL_BATCH * job.ranks}",
        ]
    )
    if not Path(config.index.path).exists():
        build_index(config)
    return config


def epoch(source: Source, maker: BatchMaker) -> Iterator[Sequence[dict]]:
    """Yield the samples of one rank, batch by batch, until the data ends."""
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            yield batch.payloads or []
        if plan.last:
            return


def stream_with_buffer(paths: Sequence[Path]) -> float:
    """Return the rows per CPU second of streaming decode with a shuffle buffer."""
    rng = random.Random(0)
    order = rng.sample(list(paths), len(paths))
    buffer: list[object] = []
    decode = msgspec.json.Decoder().decode
    rows = 0
    started = time.process_time()
    for path in order:
        data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
        for line in data.splitlines():
            row = decode(line)
            rows += 1
            if len(buffer) < BUFFER_ROWS:
                buffer.append(row)
                continue
            place = rng.randrange(BUFFER_ROWS)
            buffer[place], row = row, buffer[place]
    return rows / (time.process_time() - started)


def make_layout(layout: str, rows: Path, rows_per_shard: int, scale: float) -> Path:
    """Write the rows of a folder in one layout, unless they are there; return the folder."""

    def write(folder: Path) -> None:
        lines = [line for path in sorted(rows.glob("*.jsonl")) for line in path.read_bytes().splitlines(keepends=True)]
        for number, start in enumerate(range(0, len(lines), rows_per_shard)):
            LAYOUTS[layout](folder / f"{number:05d}", lines[start : start + rows_per_shard], scale)

    return make_once(FOLDER / f"{layout}-{rows.name}-{rows_per_shard}", write)


WriteShard = Callable[[Path, list[bytes], float], None]
"""Writes lines to a shard, given its path without ending and the scale of units."""


def _write_zst(path: Path, lines: list[bytes], _scale: float) -> None:
    path.with_suffix(".jsonl.zst").write_bytes(zst_frames(lines, len(lines)))


def _write_frames(path: Path, lines: list[bytes], scale: float) -> None:
    path.with_suffix(".jsonl.zst").write_bytes(zst_frames(lines, max(int(FRAME_ROWS * scale), 16)))


def _write_gz(path: Path, lines: list[bytes], _scale: float) -> None:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(b"".join(lines), 6))


def _parquet_writer(group_rows: int) -> WriteShard:
    def write(path: Path, lines: list[bytes], scale: float) -> None:
        import pyarrow as pa  # Heavy, and only this layout needs it.
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([msgspec.json.decode(line) for line in lines])
        pq.write_table(
            table, path.with_suffix(".parquet"), row_group_size=max(int(group_rows * scale), 100), compression="zstd"
        )

    return write


def _write_tar(path: Path, lines: list[bytes], _scale: float) -> None:
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number, line in enumerate(lines):
            member = tarfile.TarInfo(f"{number:06d}.json")
            member.size = len(line)
            archive.addfile(member, BytesIO(line))


LAYOUTS: dict[str, WriteShard] = {
    "zst": _write_zst,
    "frames": _write_frames,
    "gz": _write_gz,
    "parquet-1k": _parquet_writer(1000),
    "parquet-100k": _parquet_writer(100_000),
    "tar": _write_tar,
}


def print_cost(cost: ReadCost) -> None:
    print(
        f"{cost.layout:>13}: rank of {cost.ranks:3}, {cost.lanes:3} lanes: {cost.rows_per_cpu_s:8,.0f} rows/CPU-s, "
        f"amplification {cost.amplification:6.2f} (bound {cost.lower_bound:.2f}), "
        f"first batch {cost.first_batch_s:.2f} s, {cost.rows} rows",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
