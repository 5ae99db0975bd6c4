"""Disturbance of the trainer's thread by the data plane: a reading thread next to `dataplane.workers`.

    python -m bench trainer_thread
    python -m bench.trainer_thread --unit tokens --step python --rounds 20

A step of the trainer is 25 pieces of pure Python of 1 ms each, or 15,000 operations on small tensors. While it runs,
the plane reads the batches of the next steps: 65,536 tokens of text, or 256 samples of 1 kB. Steps without a plane,
with a reading thread and with a reading process take turns; before each turn, the planes of others come to rest.
The times of pieces are compared, without the time that the trainer waits for data. They do not contain the time in
which the thread could run and had no core, so that they are the same on a machine with other load.

Steps without a plane have two turns in each round. The ratio of the two is the noise of the measurement. In a third
turn without a plane, a process that shares nothing with the trainer copies memory, about as long as a plane reads: the
cores of a machine share caches, memory and power, so this disturbs the trainer as well. *p99 ratio* is
the median over all rounds of the ratio of p99, *pooled* the ratio of the p99 of all pieces of all rounds. A reading
thread that does not get the interpreter lets the trainer wait instead of disturbing it, so the wait is printed as well,
and the CPU time of the plane in the trainer's thread.
"""

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench._corpus import make_rows
from bench._results import write_results
from bench.text import NUM_ROWS, corpus_settings
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch

STEPS_PER_TURN = 12
PIECES_PER_STEP = 25
SMALL_OPERATIONS = 15_000
SETTLE_S = 0.15
"""Pause before a turn, in which the planes of other turns fill their queues."""
UNITS = {
    "tokens": ["dataplane.seq_len=1024", "dataplane.global_batch_size=64"],
    "samples": ["mixture.unit=samples", "dataplane.global_batch_size=256"],
}
NOTHING = "nothing"
AGAIN = "nothing, again"
COPIES = "another process"
MODES = {"thread": 0, "process": 1}
"""Name of the reader → `dataplane.workers`."""

COPIER = """
import sys, time
import numpy as np
source, target = np.ones(1 << 20), np.empty(1 << 20)
for line in sys.stdin:
    end_s = time.process_time() + float(line)
    while time.process_time() < end_s:
        np.copyto(target, source)
"""
STEPS_PER_BURST = 8
"""Steps whose batches a plane reads together."""
BURST_S = 0.013
"""CPU time in which a plane reads these batches: 500,000 tokens, or 2,000 samples in 0.005."""

Step = Callable[[], list[float]]
"""A step of the trainer; returns the times of its pieces in seconds."""


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all figures."""
    steps: dict[str, Callable[[], Step]] = {"python": _python_pieces, "tensors": _tensor_pieces}
    parser = argparse.ArgumentParser()
    parser.add_argument("--unit", nargs="*", choices=UNITS, default=list(UNITS))
    parser.add_argument("--step", nargs="*", choices=steps, default=list(steps))
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args(options)
    results: list[dict[str, Any]] = []
    print(
        f"{'step':8} {'what':8} {'read by':15} {'p50 ratio':>9} {'p99 ratio':>9} {'quartiles':>12} {'pooled':>7} "
        f"{'call p50':>9} {'wait':>8}"
    )
    for unit in arguments.unit:
        for name in arguments.step:
            for result in _compare(steps[name](), UNITS[unit], arguments.rounds):
                results.append({"step": name, "unit": unit, **result})
                low, high = result["p99_quartiles"]
                print(
                    f"{name:8} {unit:8} {result['mode']:15} {result['p50_ratio']:9.3f} {result['p99_ratio']:9.3f} "
                    f"{low:5.2f}–{high:<6.2f} {result['pooled_p99_ratio']:7.3f} "
                    f"{result['call_p50_ms']:6.2f} ms {result['wait_ms']:5.2f} ms",
                    flush=True,
                )
    write_results("trainer_thread", {"results": results})


class _Turns:
    """The turns of one kind of steps."""

    def __init__(self, step: Step, batches: Iterator[Batch | None] | None) -> None:
        """Take the batches of a plane, or none."""
        self._step = step
        self._batches = batches
        self.pieces: list[list[float]] = []
        """Seconds of the pieces of every turn."""
        self.call_s: list[float] = []
        """CPU seconds of the plane in this thread, for every step."""
        self.wait_s: list[float] = []
        """Seconds until the plane gave a batch, for every step."""

    def take(self) -> None:
        """Run the steps of one turn."""
        time.sleep(SETTLE_S)
        self._step()  # Fills the caches of the core.
        pieces: list[float] = []
        for _ in range(STEPS_PER_TURN):
            began_s = time.perf_counter()
            began_cpu_s = time.thread_time()
            batch = next(self._batches) if self._batches is not None else None
            self.wait_s.append(time.perf_counter() - began_s)
            self.call_s.append(time.thread_time() - began_cpu_s)
            pieces += self._step()
            del batch
        self.pieces.append(pieces)

    def result(self, mode: str, base: "_Turns") -> dict[str, Any]:
        """Return the figures next to those of steps without a plane."""
        quantiles = [np.quantile(turns.pieces, (0.5, 0.99), axis=1) for turns in (self, base)]
        p50_ratios, p99_ratios = quantiles[0] / quantiles[1]
        return {
            "mode": mode,
            "p50_ratio": float(np.median(p50_ratios)),
            "p99_ratio": float(np.median(p99_ratios)),
            "p99_quartiles": np.quantile(p99_ratios, (0.25, 0.75)).tolist(),
            "pooled_p99_ratio": float(np.quantile(self.pieces, 0.99) / np.quantile(base.pieces, 0.99)),
            "p99_without_ms": float(np.median(quantiles[1][1])) * 1e3,
            "call_p50_ms": float(np.quantile(self.call_s, 0.5)) * 1e3,
            "call_p99_ms": float(np.quantile(self.call_s, 0.99)) * 1e3,
            "wait_ms": float(np.mean(self.wait_s)) * 1e3,
        }


def _compare(step: Step, words: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of every mode."""
    settings = corpus_settings(make_rows(NUM_ROWS))
    with ExitStack() as planes:
        turns = {NOTHING: _Turns(step, None), AGAIN: _Turns(step, None)}
        for mode, count in MODES.items():
            config = compose([*settings, *words, f"dataplane.workers={count}"])
            batches = iter(planes.enter_context(DataPlane.open(config)))
            next(batches)
            turns[mode] = _Turns(step, batches)
        turns[COPIES] = _Turns(step, _bursts(planes))
        for number in range(rounds):
            # In both directions, so that no mode always follows the same one.
            for of_mode in list(turns.values())[:: 1 if number % 2 == 0 else -1]:
                of_mode.take()
    for mode in (AGAIN, COPIES, *MODES):
        yield turns[mode].result(mode, turns[NOTHING])


def _bursts(exits: ExitStack) -> Iterator[None]:
    """Start a process, and let it copy memory whenever a plane would read."""
    command = [sys.executable, "-c", COPIER]
    process = exits.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1))
    pipe = process.stdin
    assert pipe is not None
    exits.callback(pipe.close)
    for step in itertools.count():
        if step % STEPS_PER_BURST == 0:
            pipe.write(f"{BURST_S}\n")
        yield None


def _clock_s() -> float:
    """Return a time that stands still while this thread could run and has no core."""
    # Nanoseconds on a core, and nanoseconds in the queue of a core.
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.perf_counter() - int(waited_ns) / 1e9


def _python_pieces() -> Step:
    """Return a step of pure Python, whose pieces take about 1 ms; it returns their times."""
    began_s = time.thread_time()
    _count(1_000_000)
    iterations = int(1_000_000 * 1e-3 / (time.thread_time() - began_s))

    def step() -> list[float]:
        seconds = []
        for _ in range(PIECES_PER_STEP):
            began_s = _clock_s()
            _count(iterations)
            seconds.append(_clock_s() - began_s)
        return seconds

    return step


def _count(iterations: int) -> int:
    """Run a loop that makes no objects: to allocate them takes up to a fifth longer after others were freed."""
    parity = 0
    for _ in itertools.repeat(None, iterations):
        parity ^= 1
    return parity


def _tensor_pieces() -> Step:
    """Return a step of operations on small tensors, one piece; it returns its time."""
    import torch  # Heavy, and only this benchmark needs it.

    torch.set_num_threads(1)
    tensor = torch.zeros(8)

    def step() -> list[float]:
        began_s = _clock_s()
        for _ in range(SMALL_OPERATIONS):
            tensor.add_(1.0)
        return [_clock_s() - began_s]

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
