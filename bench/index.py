"""The property index and reading through it: size, build, queries at scale, raw JSONL to batches.

Every rate is CPU time of one core, warm files, medians of some rounds in which ours and what it is compared with take turns:
this machine may be shared. What cannot be installed here is quoted with where it was measured. `--quick` takes a tenth of the
rows.
"""

import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench._billion_index import make_index, make_shards
from bench._corpus import FOLDER, make_number_rows, make_rows, make_tokenizer
from bench._format_digests import NUM_SEQUENCES, SOURCE, digests
from bench.index_parallel import best
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.formats.base import PropertyField, ScanSpec
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.tokens.tokenizer import load_tokenizer

OUT = Path(__file__).resolve().parent / "out" / "index.json"
ROUNDS = 3
GIB = 1 << 30
MIXTERA_REGISTRATION = 0.6e5, 1.1e5
"""Rows of 1.1 kB per CPU-second: Mixtera's registration, measured before on another day."""
MIXTERA_LOCAL = 0.9e3, 5e3
"""The same of its local mode, rows read."""
TORCHDATA_MMAP = 1.3e5
FIELDS = ScanSpec(
    text="text", properties=(PropertyField(name="source", path="meta.redpajama_set_name", kind=Kind.CATEGORY),)
)
TEXT_ROW = msgspec.defstruct("TextRow", [("text", str)], gc=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table."""

    what: str
    ours: float
    unit: str
    limit: str
    """What it is compared with."""
    other: float
    """Its figure."""
    ratio: float
    goal: str
    met: bool


def main() -> None:
    """Measure, print, write."""
    quick = "--quick" in sys.argv
    lines: list[Line] = []
    print(f"{'what':52} {'ours':>16}  {'compared with':44} {'figure':>10} {'ratio':>6}  goal")
    for line in _lines(quick):
        lines.append(line)
        met = "" if line.met else "   MISSED"
        ours = f"{line.ours:,.4g} {line.unit}"
        print(
            f"{line.what:52} {ours:>16}  {line.limit:44} {line.other:10,.4g} {line.ratio:6.2f}  {line.goal}{met}",
            flush=True,
        )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"quick": quick, "lines": [asdict(line) for line in lines]}, indent=2) + "\n")


def _lines(quick: bool) -> Iterator[Line]:
    num_rows = 100_000 if quick else 1_000_000
    yield from _queries(1_000_000 if quick else 4_000_000)
    yield from _numbers(1_000_000 if quick else 10_000_000)
    yield from _builds(make_rows(num_rows), num_rows)
    yield from _ranks(make_rows(num_rows))
    yield _formats()
    yield from _reads(make_rows(num_rows), 40 if quick else 200)


# -- size and build


def _builds(data: Path, num_rows: int) -> Iterator[Line]:
    shard = min(data.iterdir())
    build, count = _building(data, None), _building(data, make_tokenizer())
    loop, plain, full, bare = [], [], [], []
    for _ in range(ROUNDS):
        loop.append(_rate(lambda: _decode_loop(shard, msgspec.json.Decoder(RowType(FIELDS).struct))))
        plain.append(_rate(build))
        full.append(_rate(count))
        bare.append(_tokenizer_rate(data))
    bytes_per_row = (FOLDER / "built.h5").stat().st_size / num_rows
    yield _at_most("index size, tokens counted, SlimPajama's shape", bytes_per_row, "B/row", "goal", 8)
    rows, limit = statistics.median(plain), statistics.median(loop)
    yield _ratio("build, tokens not counted", rows, "rows/s", "msgspec over lines, same fields", limit, 0.5)
    for figure in MIXTERA_REGISTRATION:
        yield _ratio("build, tokens not counted", rows, "rows/s", "Mixtera's registration (measured before)", figure, 4)
    rows, alone = statistics.median(full), statistics.median(bare)
    yield _ratio("build, tokens counted", rows, "rows/s", "bare gigatoken, same texts", alone, 0.8)
    together = 1 / (1 / limit + 1 / alone)
    yield _ratio("build, tokens counted", rows, "rows/s", "that loop and gigatoken, one after the other", together, 0.8)


def _ranks(data: Path) -> Iterator[Line]:
    """By the clock: on a machine with other work, or fewer cores than ranks, it shows less than there is."""
    builds = {num_ranks: best(data, num_ranks, make_tokenizer()) for num_ranks in (1, 2, 4, 8)}
    seconds = {num_ranks: build["wall_s"] for num_ranks, build in builds.items()}
    files = len({build["file"] for build in builds.values()})
    for num_ranks in (2, 4, 8):
        speed_up = seconds[1] / seconds[num_ranks]
        yield Line(
            what=f"build by {num_ranks} ranks on {os.cpu_count()} cores, tokens counted",
            ours=seconds[num_ranks],
            unit="s",
            limit="one rank, by the clock",
            other=seconds[1],
            ratio=speed_up,
            goal="≥ 1.6" if num_ranks == 2 else "shown",
            met=num_ranks > 2 or speed_up >= 1.6,
        )
    yield _at_most("different files that 1, 2, 4 and 8 ranks build", files, "", "goal", 1)


def _formats() -> Line:
    found = digests()
    what = f"different streams of {NUM_SEQUENCES} sequences, {len(found)} formats"
    return _at_most(what, len(set(found.values())), "", "goal", 1)


def _building(data: Path, tokenizer: Path | None) -> Callable[[], int]:
    """What builds an index and counts its rows."""
    path = FOLDER / "built.h5"
    unit = [f"dataplane.tokenizer={tokenizer}"] if tokenizer else ["mixture.unit=samples"]
    config = compose([f"data.root={data}", SOURCE, f"index.path={path}", *unit])

    def build() -> int:
        path.unlink(missing_ok=True)
        return build_index(config).samples

    return build


def _decode_loop(shard: Path, decoder: "msgspec.json.Decoder[Any]") -> int:
    rows = 0
    with shard.open("rb") as file:
        for line in file:
            decoder.decode(line)
            rows += 1
    return rows


def _scattered(shard: Path) -> list[tuple[int, int]]:
    """First byte and bytes of every row, shuffled but for every thousand, which is in the order of the disk: as ours reads."""
    lengths = np.array([len(line) for line in shard.read_bytes().splitlines(keepends=True)])
    random = np.random.Generator(np.random.Philox(0)).permutation(len(lengths))
    order = np.concatenate([np.sort(random[i : i + 1000]) for i in range(0, len(random), 1000)])
    return list(zip((np.cumsum(lengths) - lengths)[order].tolist(), lengths[order].tolist(), strict=True))


def _decode_scattered(shard: Path, places: list[tuple[int, int]], decoder: "msgspec.json.Decoder[Any]") -> int:
    """Rows decoded where they lie, a thousand held at a time."""
    rows: list[Any] = []
    with shard.open("rb", buffering=0) as file:
        for first in range(0, len(places), 1000):
            rows = [decoder.decode(os.pread(file.fileno(), n, at)) for at, n in places[first : first + 1000]]
    return len(places) if rows else 0


def _tokenizer_rate(data: Path) -> float:
    """Rows per second of a fresh tokenizer that has nothing else to do, all shards in turn."""
    tokenizer, decoder = load_tokenizer(make_tokenizer()), msgspec.json.Decoder(TEXT_ROW)
    rows, seconds = 0, 0.0
    for shard in sorted(data.iterdir()):
        texts = [row.text for row in decoder.decode_lines(shard.read_bytes())]
        seconds += len(texts) / _rate(functools.partial(_tokenize, tokenizer, texts, len))
        rows += len(texts)
    return rows / seconds


def _tokenize(tokenizer: Any, texts: list[str], size: Callable[[list[Any]], int]) -> int:
    """Encode some hundred documents at a time; `size` says what of the results is counted."""
    groups = (texts[i : i + 256] for i in range(0, len(texts), 256))
    return sum(size(tokenizer.encode_each(group)) for group in groups)


# -- queries


def _queries(num_blocks: int) -> Iterator[Line]:
    """In processes of their own, Python's start included; one thread each, so CPU seconds are what an idle machine takes."""
    samples = num_blocks * 250 / 1e9
    for mixed, shape in ((1, "stored source by source"), (10, "shuffled, 50 combos a block")):
        # Not in this process: what it has held once would count as memory of every process it starts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            path = apart.submit(make_index, FOLDER, num_blocks, mixed).result()
        wish = ["mixture.unit=samples", f"index.path={path}"]
        cpu_s, peak = _command("query", *wish, "query.where=\"language in ['en', 'de']\"")
        name = f"open + query, {samples:.2g}e9 samples, {shape}"
        yield _at_most(name, cpu_s, "s", "goal", 2)
        yield _at_most(name + ", memory", peak / GIB, "GiB", "goal", 1)
    path = make_index(FOLDER, num_blocks, 1)
    root = make_shards(FOLDER, path)
    wish = ["mixture.unit=samples", "mixture.group_by=[source]", f"index.path={path}", f"data.root={root}"]
    cpu_s, _ = _command("plan", *wish, "training.num_steps=100000")
    yield _at_most(f"plan, {samples:.2g}e9 samples, 10 domains, 100,000 steps", cpu_s, "s", "goal", 5)


def _numbers(num_rows: int) -> Iterator[Line]:
    data, path = make_number_rows(num_rows), FOLDER / f"numbers-{num_rows}.h5"
    if not path.exists():
        numbers = [f"data.properties.{name}={{path:{name},kind:number}}" for name in ("day", "quality")]
        build_index(
            compose(
                [f"data.root={data}", f"index.path={path}", "mixture.unit=samples", "data.properties.s=s", *numbers]
            )
        )
    for where in ("1000 <= day < 1300", "quality >= 0.5"):
        command = [sys.executable, "-m", "mixtera_hpc", "query", "--json", "--explain", "mixture.unit=samples"]
        out = subprocess.run(
            [*command, f"index.path={path}", f'query.where="{where}"'], capture_output=True, check=True
        )
        found: dict[str, Any] = json.loads(out.stdout)["explain"]
        pruned = found["pruned_by_zones"] / found["blocks"]
        seconds = found["count_s"] + found["read_s"]
        name = f"{where}: {found['samples_scanned']:,} of {num_rows:,} samples"
        yield Line(
            what=name,
            ours=seconds,
            unit="s",
            limit=f"blocks pruned, of {found['blocks']:,}",
            other=found["pruned_by_zones"],
            ratio=pruned,
            goal="shown",
            met=True,
        )


def _command(*words: str) -> tuple[float, int]:
    """CPU seconds (median) and peak memory in bytes (largest) of a verb, after one run that warms the files up."""
    runs = [_whole_process([sys.executable, "-m", "mixtera_hpc", *words]) for _ in range(ROUNDS + 1)][1:]
    return statistics.median(seconds for seconds, _ in runs), max(peak for _, peak in runs)


def _whole_process(command: list[str]) -> tuple[float, int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


# -- reading


def _reads(data: Path, num_steps: int) -> Iterator[Line]:
    index = FOLDER / "built.h5"
    wish = [f"data.root={data}", SOURCE, f"index.path={index}", f"dataplane.tokenizer={make_tokenizer()}"]
    wish += ["mixture.group_by=[source]", "dataplane.audit=false"]
    for seq_len, batch in ((1024, 64), (8192, 32)):
        steps = max(4, num_steps * 1024 * 64 // (seq_len * batch))
        more = [f"dataplane.seq_len={seq_len}", f"dataplane.global_batch_size={batch}"]
        yield from _read_tokens(compose([*wish, *more]), steps)
    yield from _read_samples(compose([*wish, "mixture.unit=samples", "dataplane.global_batch_size=256"]), num_steps)


def _read_tokens(config: Config, num_steps: int) -> Iterator[Line]:
    """Ours and the bare tokenizer over the very texts that ours tokenized, in its order, both from a fresh tokenizer."""
    texts, shard = _texts_of(open_source(config, Local()), num_steps), min(Path(config.data.root).iterdir())
    ours, bare, loop, scattered = [], [], [], []
    places = _scattered(shard)
    for _ in range(ROUNDS):
        source, fresh = open_source(config, Local()), load_tokenizer(make_tokenizer())
        ours.append(_rate(functools.partial(_serve, source, num_steps)) / 1e6)
        bare.append(_rate(functools.partial(_tokenize, fresh, texts, lambda found: sum(map(len, found)))) / 1e6)
        loop.append(_rate(lambda: _decode_loop(shard, msgspec.json.Decoder(TEXT_ROW))))
        scattered.append(_rate(lambda: _decode_scattered(shard, places, msgspec.json.Decoder(TEXT_ROW))))
    name = f"raw JSONL → packed batches, seq_len {config.dataplane.seq_len:,}"
    got, alone = statistics.median(ours), statistics.median(bare)
    yield _ratio(name, got, "Mtok/s", "bare gigatoken, same texts", alone, 0.8)
    tokens_per_row = _tokenize(load_tokenizer(make_tokenizer()), texts, lambda found: sum(map(len, found))) / len(texts)
    for rows, order in ((loop, "over lines"), (scattered, "at shuffled rows")):
        together = 1 / (1 / alone + 1e6 / (statistics.median(rows) * tokens_per_row))
        yield _ratio(name, got, "Mtok/s", f"msgspec {order}, then gigatoken", together, 0.8)


def _read_samples(config: Config, num_steps: int) -> Iterator[Line]:
    source, shard = open_source(config, Local()), min(Path(config.data.root).iterdir())
    ours, loop, scattered = [], [], []
    places = _scattered(shard)
    for _ in range(ROUNDS):
        ours.append(_rate(functools.partial(_serve, source, num_steps)))
        loop.append(_rate(lambda: _decode_loop(shard, msgspec.json.Decoder())))
        scattered.append(_rate(lambda: _decode_scattered(shard, places, msgspec.json.Decoder())))
    got = statistics.median(ours)
    name = "raw JSONL → samples, shuffled"
    yield _ratio(name, got, "rows/s", "msgspec over lines, in file order", statistics.median(loop), 0.3)
    yield _ratio(name, got, "rows/s", "msgspec, a pread a row, shuffled", statistics.median(scattered), 0.5)
    for figure in MIXTERA_LOCAL:
        yield _ratio(name, got, "rows/s", "Mixtera's local mode (measured before)", figure, 50)
    yield _ratio(name, got, "rows/s", "torchdata over mmap (measured before)", TORCHDATA_MMAP, 1.5)


def _serve(source: Source, num_steps: int) -> int:
    """Tokens, or samples, of so many steps."""
    return sum(batch.tokens.size or len(batch.payloads or []) for batch in _batches(source, num_steps))


def _batches(source: Source, num_steps: int) -> Iterator[Any]:
    maker, step = BatchMaker(source, BatchSlice(first=0, size=source.planner.global_batch_size), audit=False), 0
    state = PlannerState.start(source.num_domains)
    while step < num_steps:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            yield batch
            step += 1
    maker.close()


class _Listening:
    """A tokenizer that keeps what it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.texts = tokenizer, []

    def encode_each(self, documents: list[str]) -> Any:
        self.texts += documents
        return self._tokenizer.encode_each(documents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _texts_of(source: Source, num_steps: int) -> list[str]:
    listening = _Listening(source.tokenizer)
    for _ in _batches(replace(source, tokenizer=listening), num_steps):
        pass
    return listening.texts


# -- measuring


def _rate(work: Callable[[], int]) -> float:
    """What `work` counts per second of this process's CPU."""
    began = time.process_time()
    return work() / (time.process_time() - began)


def _ratio(what: str, ours: float, unit: str, limit: str, other: float, goal: float) -> Line:
    ratio = ours / other
    return Line(
        what=what, ours=ours, unit=unit, limit=limit, other=other, ratio=ratio, goal=f"≥ {goal:g}", met=ratio >= goal
    )


def _at_most(what: str, ours: float, unit: str, limit: str, goal: float) -> Line:
    return Line(
        what=what,
        ours=ours,
        unit=unit,
        limit=limit,
        other=goal,
        ratio=ours / goal,
        goal=f"≤ {goal:g}",
        met=ours <= goal,
    )


if __name__ == "__main__":
    main()
