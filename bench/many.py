"""Cost per row with many domains and with many shards, and time to open a data plane with many domains.

    python -m bench many

Serves samples of 230 bytes from JSONL with the default shuffle, on one rank, in steps of 256. Shards are equal, and
the sizes of domains follow Zipf's law. Then opens data planes with two samples per domain on average, and takes the
first batch. Prints tables and writes bench/out/many.json. Run it under `ulimit -n 1024` to see the effect of few file
descriptors.
"""

import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench._results import OUT, write_results
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

NUM_ROWS = 1_000_000
BATCH = 256
STEPS = NUM_ROWS // BATCH
"""About an epoch of every domain, so that the price of opening every shard is in the cost of its rows."""
ROUNDS = 3
SHAPES = ((10, 7), (10, 100), (10, 1000), (300, 7), (5000, 7))
"""Pairs of shards and domains."""
OPENED_DOMAINS = (100, 1000, 5000, 30_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """CPU time per row, the median of interleaved rounds."""

    num_shards: int
    num_domains: int
    row_us: float
    ratio: float
    """To the first shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """CPU seconds until a data plane is open, and from then until its first batch; medians of interleaved rounds."""

    num_domains: int
    open_s: float
    first_batch_s: float


def main() -> None:
    """Measure, print and write all results."""
    configs = [make_corpus(num_shards, num_domains) for num_shards, num_domains in SHAPES]
    times: list[list[float]] = [[] for _ in SHAPES]
    for _ in range(ROUNDS):
        for config, of_shape in zip(configs, times, strict=True):
            of_shape.append(row_us(config))
    medians = [statistics.median(of_shape) for of_shape in times]

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    print(f"{'shards':>7} {'domains':>8} {'per row':>10} {'ratio':>6}   (descriptors: {limit})")
    costs = []
    for (num_shards, num_domains), median in zip(SHAPES, medians, strict=True):
        cost = RowCost(num_shards=num_shards, num_domains=num_domains, row_us=median, ratio=median / medians[0])
        costs.append(cost)
        print(f"{num_shards:>7} {num_domains:>8} {cost.row_us:>7.1f} us {cost.ratio:>6.2f}")

    print(f"{'domains':>8} {'opening':>9} {'first batch':>12}")
    openings = measure_openings()
    for opening in openings:
        print(f"{opening.num_domains:>8,} {opening.open_s:>7.2f} s {opening.first_batch_s:>10.2f} s")
    content = {"descriptors": limit, "costs": [asdict(cost) for cost in costs]}
    write_results("many", {**content, "openings": [asdict(opening) for opening in openings]})


def measure_openings() -> list[Opening]:
    """Return the times for every number of domains."""
    configs = [make_corpus(1, num_domains, 2 * num_domains) for num_domains in OPENED_DOMAINS]
    times: list[list[tuple[float, float]]] = [[] for _ in configs]
    for _ in range(ROUNDS):
        for config, of_config in zip(configs, times, strict=True):
            of_config.append(opening_s(config))
    return [
        Opening(num_domains=num_domains, open_s=open_s, first_batch_s=first_batch_s)
        for num_domains, of_config in zip(OPENED_DOMAINS, times, strict=True)
        for open_s, first_batch_s in [map(statistics.median, zip(*of_config, strict=True))]
    ]


def opening_s(config: Config) -> tuple[float, float]:
    """Return the CPU seconds to open a data plane, and those to its first batch."""
    begin_s = time.process_time()
    with DataPlane.open(config, Local()) as plane:
        opened_s = time.process_time()
        next(iter(plane))
        return opened_s - begin_s, time.process_time() - opened_s


def make_corpus(num_shards: int, num_domains: int, num_rows: int = NUM_ROWS) -> Config:
    """Write the shards and build the index, unless they exist; return the configuration."""
    name = f"{num_shards}-{num_domains}" if num_rows == NUM_ROWS else f"{num_shards}-{num_domains}-{num_rows}"
    folder = OUT / "many" / name
    config = compose(
        [
            f"data.root={folder / 'data'}",
            "data.properties.source=source",
            f"index.path={folder / 'index.h5'}",
            "mixture.group_by=[source]",
            "mixture.unit=samples",
            f"dataplane.global_batch_size={BATCH}",
        ]
    )
    if not Path(config.index.path or "").exists():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        shares = 1 / np.arange(1.0, num_domains + 1)
        domains = np.random.default_rng(0).choice(num_domains, num_rows, p=shares / shares.sum())
        # Every domain has a row.
        domains[:num_domains] = np.arange(num_domains)
        for number, of_shard in enumerate(np.array_split(domains, num_shards)):
            lines = [f'{{"text": "{"x" * 200}", "source": "{domain:04}"}}\n' for domain in of_shard.tolist()]
            (folder / "data" / f"{number:05}.jsonl").write_text("".join(lines))
        build_index(config)
    return config


def row_us(config: Config) -> float:
    """Return the CPU time per row of the first epoch, in microseconds."""
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(), audit=False)
    batches = endless_batches(source, maker)
    begin = time.process_time()
    for _ in range(STEPS):
        next(batches)
    seconds = time.process_time() - begin
    maker.close()
    return seconds / (STEPS * BATCH) * 1e6


def endless_batches(source: Source, maker: BatchMaker) -> Iterator[Batch]:
    """Yield the batches of one chunk after the other."""
    state = PlannerState.start(source.num_domains)
    weights = source.weights
    while True:
        plan, state = source.planner.plan(state, weights)
        yield from maker.batches(plan, 0)


if __name__ == "__main__":
    main()
