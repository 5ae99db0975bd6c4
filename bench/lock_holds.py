"""Longest times for which the trainer's thread waits for the interpreter's lock while the data plane reads in a thread.

    python -m bench lock_holds
    python -m bench.lock_holds --only tokens many

A thread makes batches as the reading thread of a rank does, while the main thread asks for the lock every 50 µs and
does nothing else. A wait counts the time in which the reading thread was on a core, so that other load does not matter.
The table has the number of batches, the number of waits of more than 1 ms, the longest, and where the reading thread
was. The cause of such a wait is a call that holds the lock, a garbage collection in it, or many short calls. Short
calls, such as positioned reads, give the lock up and get it back before the waiting thread has woken. Writes
bench/out/lock_holds.json.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import FrameType

from bench._corpus import make_rows
from bench._results import write_results
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

LIMIT_S = 1e-3
SWITCH_S = 50e-6
NUM_BATCHES = 120
RANKS = 1024
"""Ranks of a large job, of which one is measured."""
COMPRESSED_ROWS = 94_536
ROWS_PER_SHARD = 909
SCALE = 1 / 41


@dataclass(slots=True, kw_only=True)
class LockHolds:
    """The measurement of one kind of data."""

    data: str
    batches: int = 0
    waits: int = 0
    """Waits of more than the limit."""
    longest_ms: float = 0.0
    places: dict[str, int] = field(default_factory=dict)
    """Place of the reading thread after such a wait → number of waits."""


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--batches", type=int, default=NUM_BATCHES)
    arguments = parser.parse_args(options)
    results = []
    print(f"{'data':12} {'batches':>8} {'waits > 1 ms':>13} {'longest':>10}")
    for name in arguments.only:
        config, num_ranks = DATA[name]()
        holds = measure(name, config, num_ranks, arguments.batches)
        results.append(asdict(holds))
        print(f"{name:12} {holds.batches:8} {holds.waits:13} {holds.longest_ms:7.2f} ms", flush=True)
        for place, count in sorted(holds.places.items(), key=itemgetter(1), reverse=True)[:8]:
            print(f"{count:26} × {place}")
    write_results("lock_holds", {"holds": results})


def measure(name: str, config: Config, num_ranks: int, num_batches: int) -> LockHolds:
    """Make batches of one rank in a thread, and record long waits."""
    source = open_source(config, Local())
    maker = BatchMaker(source, BatchSlice(group=num_ranks // 2, num_groups=num_ranks), audit=False)
    holds = LockHolds(data=name)

    has_ended = threading.Event()
    may_exit = threading.Event()

    def read() -> None:
        try:
            for _ in islice(endless_batches(source, maker), num_batches):
                holds.batches += 1
        finally:
            has_ended.set()
            may_exit.wait()

    reader = threading.Thread(target=read)
    usual_interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    reader.start()
    _watch(reader, has_ended, holds)
    sys.setswitchinterval(usual_interval)
    may_exit.set()
    reader.join()
    maker.close()
    return holds


def _watch(reader: threading.Thread, has_ended: threading.Event, holds: LockHolds) -> None:
    """Record the waits for the lock until a thread has made its batches."""
    assert reader.ident is not None  # It has started.
    clock = time.pthread_getcpuclockid(reader.ident)
    with Path("/proc/thread-self/schedstat").open("rb", buffering=0) as statistics:

        def waited_s() -> float:
            """Return the time in which this thread could run and had no core."""
            return int(os.pread(statistics.fileno(), 100, 0).split()[1]) / 1e9

        # The clock of a thread that has ended cannot be read.
        while not has_ended.is_set():
            waited_before_s = waited_s()
            began_s = time.perf_counter()
            reader_began_s = time.clock_gettime(clock)
            time.sleep(0)  # Gives the lock up, and waits for it.
            # The other thread waits for its turn now, so its clock stands still.
            reader_s = time.clock_gettime(clock) - reader_began_s
            passed_s = time.perf_counter() - began_s
            held_s = min(reader_s, passed_s - (waited_s() - waited_before_s))
            frame = sys._current_frames().get(reader.ident)
            if held_s > LIMIT_S and frame is not None:
                holds.waits += 1
                holds.longest_ms = max(holds.longest_ms, held_s * 1e3)
                place = _place(frame)
                holds.places[place] = holds.places.get(place, 0) + 1


def _place(frame: FrameType) -> str:
    """Return where a thread is: the innermost functions of ours, and the one that they have called."""
    names = [f"{frame.f_code.co_name}:{frame.f_lineno}"]
    caller = frame.f_back
    while caller is not None and len(names) < 4:
        names.append(f"{Path(caller.f_code.co_filename).stem}.{caller.f_code.co_name}:{caller.f_lineno}")
        caller = caller.f_back
    return " ← ".join(names)


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


DATA: dict[str, Callable[[], tuple[Config, int]]] = {
    "text": lambda: (_text(), 1),
    "1,024 ranks": lambda: (_large_job(), RANKS),
    "samples": lambda: (_samples(), 1),
    "tokens": lambda: (_stored_tokens(), 1),
    "zst": lambda: (_compressed("zst"), 1),
    "parquet": lambda: (_compressed("parquet-100k"), 1),
    "many": lambda: (make_many(10, 1000), 1),
}
"""Name → the configuration, and the number of ranks of its job."""


if __name__ == "__main__":
    main(sys.argv[1:])
