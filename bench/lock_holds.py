"""Calls that hold the interpreter's lock for more than 1 ms of CPU time while a rank reads.

    python -m bench lock_holds
    python -m bench.lock_holds --only tokens many

A small library (lock_holds.c, compiled by `cc`) is loaded before Python. It measures the CPU time between any two
moments at which another thread could get the lock: between two places where the interpreter looks for requests of other
threads, or until a call gives the lock up. So other load, and the time in which a waiting thread wakes up, do not
count. Every measurement runs three times in new processes. Of a call, given by its batch and place, the shortest time
counts, because interrupts and the host of a virtual machine take CPU time now and then. Objects that existed before the
first batch are hidden from the garbage collector, which would visit those of a trainer, too.

The table has the number of batches, the number of holds of more than 1 ms, the longest, and their places, the innermost
function first. Writes bench/out/lock_holds.json.
"""

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench._corpus import FOLDER, make_once, make_rows, make_tokenizer, source_text
from bench._results import OUT, write_results
from bench.compressed import JobCase, config_of, make_layout
from bench.many import endless_batches
from bench.many import make_corpus as make_many
from bench.stored_tokens import make_corpus, run_config
from bench.text import NUM_ROWS, corpus_settings
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.index.build.build import build_index

LIMIT_NS = 1_000_000
REPORT_NS = 500_000
"""Shortest hold that a run reports."""
RUNS = 3
NUM_BATCHES = 120
RANKS = 1024
"""Ranks of a large job, of which one is measured."""
COMPRESSED_ROWS = 94_536
ROWS_PER_SHARD = 909
SCALE = 1 / 41
NUM_LONG = 1200
LONGEST = 600_000
"""Characters of the longest text."""
LIBRARY = OUT / "lock_holds.so"


@dataclass(slots=True, kw_only=True)
class LockHolds:
    """The measurement of one kind of data."""

    data: str
    batches: int
    holds: int = 0
    """Holds of more than the limit."""
    longest_ms: float = 0.0
    """CPU time of the longest one."""
    places: dict[str, int] = field(default_factory=dict)
    """Place of such a hold → number of holds."""


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--batches", type=int, default=NUM_BATCHES)
    arguments = parser.parse_args(options)
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    code = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", code, "-o", LIBRARY, "-ldl"], check=True)
    results = []
    print(f"{'data':14} {'batches':>8} {'holds > 1 ms':>13} {'longest':>10}")
    for name in arguments.only:
        holds = measure(name, arguments.batches)
        results.append(asdict(holds))
        print(f"{name:14} {holds.batches:8} {holds.holds:13} {holds.longest_ms:7.2f} ms", flush=True)
        for place, count in sorted(holds.places.items(), key=itemgetter(1), reverse=True)[:8]:
            print(f"{count:26} × {place}")
    write_results("lock_holds", {"holds": results})


def measure(name: str, num_batches: int) -> LockHolds:
    """Return the holds that all runs have."""
    DATA[name]()  # Makes the data once.
    command = [sys.executable, "-m", "bench.lock_holds", "--run", name, str(num_batches)]
    environment = {**os.environ, "LD_PRELOAD": str(LIBRARY)}
    runs: list[dict[str, list[int]]] = []
    for _ in range(RUNS):
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    result = LockHolds(data=name, batches=num_batches)
    for call in set.intersection(*map(set, runs)):
        # A place may hold the lock several times in a batch.
        for held_ns in map(min, zip(*(sorted(run[call], reverse=True) for run in runs), strict=False)):
            result.longest_ms = max(result.longest_ms, held_ns / 1e6)
            if held_ns > LIMIT_NS:
                place = call.partition(" ")[2]
                result.holds += 1
                result.places[place] = result.places.get(place, 0) + 1
    return result


def run(name: str, num_batches: int) -> dict[str, list[int]]:
    """Make batches, and return the long holds in nanoseconds, by number of the batch and place."""
    config, num_ranks = DATA[name]()
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(group=num_ranks // 2, num_groups=num_ranks), audit=False)
    library = ctypes.CDLL(str(LIBRARY))
    add_pending_call = ctypes.cast(ctypes.pythonapi.Py_AddPendingCall, ctypes.c_void_p)
    with tempfile.TemporaryFile() as file:
        report = file.fileno()
        faulthandler.register(signal.SIGUSR1, report, all_threads=False)
        gc.collect()
        gc.freeze()
        library.holds_find()
        library.holds_begin(add_pending_call, report, ctypes.c_long(REPORT_NS))
        for number, _ in enumerate(islice(endless_batches(source, maker), num_batches), 1):
            os.write(report, f"batch {number}\n".encode())
        library.holds_end()
        maker.close()
        file.seek(0)
        return _calls(file.read().decode())


def _calls(report: str) -> dict[str, list[int]]:
    """Return the holds of a report, by number of the batch and place."""
    holds: defaultdict[str, list[int]] = defaultdict(list)
    for number, batch in enumerate(re.split(r"^batch \d+\n", report, flags=re.MULTILINE)):
        for hold in batch.split("hold ")[1:]:
            frames = re.findall(r'File "(.*)", line (\d+) in (.*)', hold)
            place = " ← ".join(f"{Path(path).stem}.{function}:{line}" for path, line, function in frames[:4])
            holds[f"{number} {place}"].append(int(hold.split()[0]))
    return holds


def _text() -> Config:
    return compose([*corpus_settings(make_rows(NUM_ROWS)), "dataplane.seq_len=1024", "dataplane.global_batch_size=64"])


def _large_job() -> Config:
    words = ["dataplane.seq_len=4096", f"dataplane.global_batch_size={8 * RANKS}", "mixture.on_exhausted=repeat"]
    return compose([*corpus_settings(make_rows(NUM_ROWS)), *words])


def _samples() -> Config:
    words = ["mixture.unit=samples", "dataplane.global_batch_size=256"]
    return compose([*corpus_settings(make_rows(NUM_ROWS)), *words])


def _stored_tokens() -> Config:
    folder = make_corpus(7)
    config = run_config(folder, folder.with_suffix(".lock_holds.h5"))
    if not Path(config.index.path or "").exists():
        build_index(config)
    return config


def _compressed(layout: str) -> Config:
    folder = make_layout(layout, make_rows(COMPRESSED_ROWS), ROWS_PER_SHARD, SCALE)
    job = JobCase(ranks=1, lanes=16, scale=SCALE, has_own_speeds=False)
    return config_of(folder, job, int((2 << 30) * SCALE))


def _long(words: list[str]) -> Config:
    """Return the configuration of documents of 1 kB to 600 kB; their sizes are log-uniform."""

    def write(folder: Path) -> None:
        text = source_text()
        sizes = np.exp(np.random.default_rng(0).uniform(np.log(1000), np.log(LONGEST), NUM_LONG)).astype(int)
        starts = (np.arange(NUM_LONG) * (len(text) - LONGEST) // NUM_LONG).tolist()
        documents = [text[start : start + size] for start, size in zip(starts, sizes.tolist(), strict=True)]
        (folder / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    folder = make_once(FOLDER / "long", write)
    return _indexed(folder, [f"dataplane.tokenizer={make_tokenizer()}", *words])


def _nested(columns: Callable[[int], dict[str, object]], name: str, group_rows: int) -> Config:
    """Return the configuration of Parquet files; `columns` returns a row, given its number."""

    def write(folder: Path) -> None:
        for number in range(4):
            first = number * 2 * group_rows
            rows = [columns(row) for row in range(first, first + 2 * group_rows)]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=group_rows)

    return _indexed(make_once(FOLDER / name, write), ["data.text=null", "mixture.unit=samples"])


def _indexed(folder: Path, words: list[str]) -> Config:
    config = compose([f"data.root={folder}", f"index.path={folder}.h5", "mixture.on_exhausted=repeat", *words])
    if not Path(config.index.path or "").exists():
        build_index(config)
    return config


def _chat(row: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "x" * (row % 400)}, {"role": "assistant", "content": "y " * (row % 800)}]
    return {"messages": messages * (1 + row % 3), "score": row / 7, "ids": list(range(row % 100))}


def _image(row: int) -> dict[str, object]:
    return {"image": np.random.default_rng(row).bytes(100_000), "caption": "a caption"}


DATA: dict[str, Callable[[], tuple[Config, int]]] = {
    "text": lambda: (_text(), 1),
    "1,024 ranks": lambda: (_large_job(), RANKS),
    "samples": lambda: (_samples(), 1),
    "tokens": lambda: (_stored_tokens(), 1),
    "zst": lambda: (_compressed("zst"), 1),
    "parquet": lambda: (_compressed("parquet-100k"), 1),
    "many": lambda: (make_many(10, 1000), 1),
    "long text": lambda: (_long(["dataplane.seq_len=2048", "dataplane.global_batch_size=16"]), 1),
    "long samples": lambda: (_long(["mixture.unit=samples", "dataplane.global_batch_size=16"]), 1),
    "chats": lambda: (_nested(_chat, "chats", 1000), 1),
    "images": lambda: (_nested(_image, "images", 200), 1),
}
"""Name → the configuration, and the number of ranks of its job."""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(sys.argv[2], int(sys.argv[3]))))
    else:
        main(sys.argv[1:])
