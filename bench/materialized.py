"""Compressed shards as published: what `index build` writes, and how fast runs read it, against streaming.

    python -m bench materialized
    python -m bench.materialized --shards 12 --shard-mb 20

Many `.jsonl.zst` files of one frame, seven domains in SlimPajama's proportions in each. The build runs with default
settings in a process of its own, with and without a token store: CPU seconds, peak memory, and disk. Runs then serve
one rank's part of a global batch, alone and as one of 64 ranks. The limit is a loop that decodes the shards in random
order into a shuffle buffer of 10,000 rows: without tokenizing, and with it. All rates are tokens per CPU second of all
rounds, whose work differs: in some, the windows of many steps are built. Prints a table and writes
bench/out/materialized.json.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zstandard

from bench._corpus import make_rows, make_tokenizer
from bench._results import write_results
from bench.compressed import BUFFER_ROWS, make_layout
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_tokenizer

SEQUENCES = 16
"""Sequences of one rank in a step."""
ROUNDS = 12
TOKENS_PER_ROUND = 20_000_000
"""Tokens of every round. They are equal, so the rate over all rounds is the harmonic mean of those of the rounds."""
TOKENS_PER_ROW = 257
"""Mean number of tokens of a row of this corpus with this tokenizer."""


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--shard-mb", type=float, default=20)
    parser.add_argument("--build", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    if arguments.build is not None:
        _build(arguments.build)
        return
    rows_per_shard = int(arguments.shard_mb * 1e6 / 1100)
    folder = make_layout("zst", make_rows(arguments.shards * rows_per_shard), rows_per_shard, 1.0)
    tokenizer = make_tokenizer()
    settings = [
        f"data.root={folder}",
        "data.properties.source=meta.redpajama_set_name",
        f"dataplane.tokenizer={tokenizer}",
        f"index.path={folder}.tokens.h5",
    ]
    builds = {words: measure_build(settings, words) for words in ("data.materialize=never", "data.materialize=auto")}
    for words, cost in builds.items():
        print(
            f"index build {words}: {cost['cpu_s']:.1f} CPU-s, peak memory {cost['peak_mb']:.0f} MB, "
            f"store {cost['store_mb']:.0f} MB of {cost['data_mb']:.0f} MB of data",
            flush=True,
        )
    rates = measure_rates(settings, sorted(folder.glob("*.zst")), load_tokenizer(tokenizer))
    for name, values in rates.items():
        print(
            f"{name:40} {statistics.harmonic_mean(values) / 1e6:6.1f} M tokens/CPU-s ({min(values) / 1e6:.1f} to "
            f"{max(values) / 1e6:.1f})"
        )
    write_results("materialized", {"builds": builds, "rates": rates})


def measure_build(settings: list[str], words: str) -> dict[str, float]:
    """Build the index in a process of its own."""
    (index,) = (Path(word.removeprefix("index.path=")) for word in settings if word.startswith("index.path="))
    store = Path(f"{index}.tokens")
    shutil.rmtree(store, ignore_errors=True)
    index.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.materialized", "--build", *settings, words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    (root,) = (Path(word.removeprefix("data.root=")) for word in settings if word.startswith("data.root="))
    return json.loads(done.stdout.splitlines()[-1]) | {
        "store_mb": sum(path.stat().st_size for path in store.glob("*.bin")) / 1e6,
        "data_mb": sum(path.stat().st_size for path in root.iterdir()) / 1e6,
    }


def _build(words: list[str]) -> None:
    from mixtera_hpc.cli.main import main as run_verb  # Only this process needs it.

    if run_verb(["index", "build", *words]):
        raise SystemExit("the build failed")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # Unlike this, the maximum of `getrusage` includes the memory of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_kb = int(status["VmHWM"].split()[0])
    print(json.dumps({"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": peak_kb / 1e3}))


def measure_rates(settings: list[str], shards: list[Path], tokenizer: Tokenizer) -> dict[str, list[float]]:
    """Return the tokens per CPU second of every round, by what was measured."""
    works: dict[str, Callable[[], int]] = {
        "from the store, one rank": Served(settings, 1),
        "from the store, one of 64 ranks": Served(settings, 64),
        "streaming and a shuffle buffer": lambda: stream(shards, tokenizer, tokenizes=False),
        "streaming, a shuffle buffer, tokenizing": lambda: stream(shards, tokenizer, tokenizes=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began_s = time.process_time()
            tokens = work()
            rates[name].append(tokens / (time.process_time() - began_s))
    return rates


class Served:
    """Batches of one rank of several, from the token store."""

    def __init__(self, settings: list[str], ranks: int) -> None:
        words = [
            *settings,
            "mixture=natural",
            "mixture.group_by=[source]",
            "mixture.on_exhausted=repeat",
            "dataplane.seq_len=2048",
            f"dataplane.global_batch_size={SEQUENCES * ranks}",
            "dataplane.chunk_steps=4",
        ]
        self._source = open_source(compose(words), Local())
        self._maker = BatchMaker(
            self._source, BatchSlice(group=ranks // 2, num_groups=ranks, is_group_leader=True), audit=False
        )
        self._state = PlannerState.start(self._source.num_domains)
        self()

    def __call__(self) -> int:
        """Serve the batches of a round; return their tokens."""
        tokens = 0
        while tokens < TOKENS_PER_ROUND:
            plan, self._state = self._source.planner.plan(self._state, self._source.weights)
            tokens += sum(batch.tokens.size for batch in self._maker.batches(plan, plan.first_step))
        return tokens


def stream(shards: list[Path], tokenizer: Tokenizer, *, tokenizes: bool) -> int:
    """Decode shards in random order into a shuffle buffer; return the tokens of the rows that leave it."""
    rng = random.Random(0)
    buffer: list[str] = []
    decode = msgspec.json.Decoder().decode
    rows = 0
    tokens = 0
    for path in rng.sample(shards, 3):
        texts: list[str] = []
        for line in zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines():
            buffer.append(decode(line)["text"])
            if len(buffer) > BUFFER_ROWS:
                place = rng.randrange(BUFFER_ROWS)
                buffer[place], text = buffer[-1], buffer[place]
                buffer.pop()
                texts.append(text)
        rows += len(texts)
        if tokenizes:
            tokens += sum(map(len, tokenizer.encode_each(texts)))
    # Without tokenizing, a row counts as many tokens as in this corpus on average.
    return tokens if tokenizes else rows * TOKENS_PER_ROW


if __name__ == "__main__":
    main(sys.argv[1:])
