"""Documents and packed tokens of plain JSONL, next to bare loops over the same rows in the same shuffled order.

    python -m bench text

Ours is measured three times: a bare `BatchMaker` in the calling thread, and the public `DataPlane` with a reading
thread and with a reading process. All loops take turns, and a rate counts the CPU seconds of all processes. Every
measurement is one epoch, so that it contains as many new windows of the shuffle as a long run. One epoch before the
measurements warms up: a new tokenizer is slow until it has seen most words. All threads and processes share one core,
as in `bench peers`. Where a reading thread moves between two cores, it loses their caches and needs 1.3 times the CPU
time.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import gigatoken
import msgspec

from bench._corpus import make_rows, make_tokenizer
from bench._figures import FigureLine, at_most, print_header, print_line, rate, ratio
from bench._format_digests import SOURCE
from bench._peers.process import use_one_core
from bench._results import write_results
from bench._row_loops import TEXT_ROW
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.rows import mapped_rows
from mixtera_hpc.dataplane.reading.rows.row_reader import RowReader
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

NUM_ROWS = 300_000
ROUNDS = 5
TOKENIZED_AT_ONCE = 256
DOCUMENTS = ["mixture.unit=samples", "dataplane.global_batch_size=1024"]
TEXT = ["dataplane.seq_len=1024", "dataplane.global_batch_size=64"]
PLANES = {"DataPlane, thread": 0, "DataPlane, process": 1}
"""Name → `dataplane.workers`."""

Reads = list[list[tuple[int, int, int]]]
"""Reads of rows: (file descriptor, first byte, bytes) of each row, as our reader groups and orders them."""


def main() -> None:
    """Measure, print and write all figures."""
    settings = corpus_settings(make_rows(NUM_ROWS))
    use_one_core()
    print_header()
    lines: list[FigureLine] = []
    for line in [*_document_lines(compose([*settings, *DOCUMENTS])), *_text_lines(compose([*settings, *TEXT]))]:
        lines.append(line)
        print_line(line)
    write_results("text", {"lines": [asdict(line) for line in lines]})


def corpus_settings(data: Path) -> list[str]:
    """Return the overrides of a corpus of seven domains, whose index is built."""
    index = data.with_suffix(".text.h5")
    settings = [f"data.root={data}", SOURCE, f"index.path={index}"]
    settings += [f"dataplane.tokenizer={make_tokenizer()}", "mixture=natural", "mixture.group_by=[source]"]
    if not index.exists():
        build_index(compose(settings))
    return settings


def _document_lines(config: Config) -> Iterator[FigureLine]:
    """Compare raw samples with decoding the same rows in the same order."""
    source = open_source(config, Local())
    num_steps = _steps_of_epoch(source)
    reads = _recorded_reads(source, num_steps)
    decoder = msgspec.json.Decoder()
    works: dict[str, Callable[[], float]] = {
        "BatchMaker": functools.partial(rate, functools.partial(_serve, _batch_sizes(source), num_steps)),
        **{mode: functools.partial(_plane_rate, _plane_sizes(config, n), num_steps) for mode, n in PLANES.items()},
        "loop": functools.partial(rate, functools.partial(_decode, reads, decoder)),
    }
    rates = _interleaved(works)
    for ours in ("BatchMaker", *PLANES):
        yield _line(f"JSONL → documents, {ours}", "rows/s", rates, ours, "pread and msgspec, same order", 0.8)
    yield _amplification(source, reads, num_steps)


def _text_lines(config: Config) -> Iterator[FigureLine]:
    """Compare packed tokens with decoding and tokenizing the same rows in the same order."""
    source = open_source(config, Local())
    num_steps = _steps_of_epoch(source)
    reads = _recorded_reads(source, num_steps)
    decoder = msgspec.json.Decoder(TEXT_ROW)
    encode = gigatoken.Tokenizer.from_json(make_tokenizer().read_bytes()).backend.encode
    works: dict[str, Callable[[], float]] = {
        "BatchMaker": functools.partial(rate, functools.partial(_serve, _batch_sizes(source), num_steps)),
        **{mode: functools.partial(_plane_rate, _plane_sizes(config, n), num_steps) for mode, n in PLANES.items()},
        "loop": functools.partial(rate, functools.partial(_tokenize, reads, decoder, encode)),
    }
    rates = _interleaved(works)
    for ours in ("BatchMaker", *PLANES):
        yield _line(
            f"JSONL → packed tokens, 1,024, {ours}",
            "tokens/s",
            rates,
            ours,
            "pread, msgspec, gigatoken, same order",
            0.85,
        )


def _interleaved(works: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return the rates of every loop; the loops take turns."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # Files and code are in memory afterwards, and the tokenizers know most words.
    for _ in range(ROUNDS):
        for name, work in works.items():
            rates[name].append(work())
    return rates


def _line(what: str, unit: str, rates: dict[str, list[float]], ours: str, limit: str, goal: float) -> FigureLine:
    """Return a line with the median rates, whose ratio is the median of the rounds' ratios."""
    other = statistics.median(rates["loop"])
    median_ratio = statistics.median(a / b for a, b in zip(rates[ours], rates["loop"], strict=True))
    return ratio(what, median_ratio * other, unit, limit, other, goal)


def _steps_of_epoch(source: Source) -> int:
    """Return the steps of one epoch of the corpus."""
    batch_items = source.planner.batch_schedule.size_at(0) * source.grid.stride
    return int(source.layout.epoch_items().sum()) // batch_items


def _batch_sizes(source: Source) -> Iterator[int]:
    """Serve steps with a bare `BatchMaker`, in this thread; yield the number of tokens or samples of each."""
    maker = BatchMaker(source, BatchSlice(), audit=False)
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            yield batch.tokens.size or len(batch.payloads or [])


def _serve(sizes: Iterator[int], num_steps: int) -> int:
    """Serve the next steps; return the number of tokens or samples."""
    return sum(islice(sizes, num_steps))


def _plane_sizes(config: Config, workers: int) -> Iterator[int]:
    """Serve steps with the public `DataPlane`; yield the number of tokens or samples of each."""
    config = replace(config, dataplane=replace(config.dataplane, workers=workers))
    with DataPlane.open(config) as plane:
        for batch in plane:
            yield batch.tokens.size or len(batch.payloads or [])


def _plane_rate(sizes: Iterator[int], num_steps: int) -> float:
    """Return tokens or samples per CPU second of the next steps."""
    began_s = _cpu_s()
    count = _serve(sizes, num_steps)
    return count / (_cpu_s() - began_s)


def _cpu_s() -> float:
    """Return the CPU time of this process and of its reading processes so far."""
    total_s = time.process_time()
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            on_core_ns, _, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
            total_s += int(on_core_ns) / 1e9
    return total_s


def _decode(reads: Reads, decoder: "msgspec.json.Decoder[Any]") -> int:
    """Decode the rows of all reads with one positioned read each; return their number."""
    count = 0
    pread = os.pread
    decode = decoder.decode
    for read in reads:
        rows = [decode(pread(descriptor, size, first)) for descriptor, first, size in read]
        count += len(rows)
    return count


def _tokenize(reads: Reads, decoder: "msgspec.json.Decoder[Any]", encode: Callable[[str], Any]) -> int:
    """Decode and tokenize the rows of all reads, some hundred at a time; return the number of tokens."""
    count = 0
    pread = os.pread
    decode = decoder.decode
    for read in reads:
        for first in range(0, len(read), TOKENIZED_AT_ONCE):
            rows = read[first : first + TOKENIZED_AT_ONCE]
            texts = [decode(pread(descriptor, size, start)).text for descriptor, start, size in rows]
            # The end of every document is a token too.
            count += sum(map(len, map(encode, texts))) + len(texts)
    return count


def _recorded_reads(source: Source, num_steps: int) -> Reads:
    """Return the rows that some steps read, in our order; the shards stay open."""
    reads: Reads = []
    root = Path(source.index.data_root)
    descriptors = [os.open(root / path, os.O_RDONLY) for path in source.index.shard_paths]
    original = RowReader._read_from_files

    def record(self: RowReader, decoder: Any, documents: Documents, shards: Any, raw: bool) -> Any:
        starts = source.blocks.offset[documents.block] + documents.offset
        places = zip(shards.tolist(), starts.tolist(), documents.length.tolist(), strict=True)
        reads.append([(descriptors[shard], start, length) for shard, start, length in places])
        return original(self, decoder, documents, shards, raw)

    RowReader._read_from_files = record  # type: ignore[method-assign]
    try:
        _serve(_batch_sizes(source), num_steps)
    finally:
        RowReader._read_from_files = original  # type: ignore[method-assign]
    return reads


def _amplification(source: Source, reads: Reads, num_steps: int) -> FigureLine:
    """Count the bytes that this process reads for every byte that it serves, by system calls and as whole blocks."""
    before = _bytes_read()
    loaded: list[int] = []
    original = mapped_rows.load_pages

    def record(address: int, num_bytes: int) -> bool:
        loaded.append(num_bytes)
        return original(address, num_bytes)

    mapped_rows.load_pages = record
    try:
        _serve(_batch_sizes(source), num_steps)
    finally:
        mapped_rows.load_pages = original
    served = sum(size for read in reads for _, _, size in read)
    num_bytes = _bytes_read() - before + sum(loaded)
    return at_most("JSONL → documents, bytes read / served", num_bytes / served, "", "goal", 1.3)


def _bytes_read() -> int:
    """Return the bytes that system calls of this process have read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main()
