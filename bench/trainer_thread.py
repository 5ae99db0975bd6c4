"""Disturbance of the trainer's thread by the data plane: a reading thread next to `dataplane.workers`.

A step of the trainer is 25 pieces of pure Python of 1 ms each, or 15,000 operations on small tensors. While it runs,
the plane reads the batches of the next steps: 65,536 tokens of text, or 256 samples of 1 kB. The steps without a plane,
with a reading thread and with a reading process take turns. What is compared are the times of pieces, without the time
that the trainer waits for data. They do not contain the time in which the thread could run and had no core, so that
they show the same on a machine with other load. A last figure is the CPU time of the plane in the trainer's thread.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench._corpus import make_rows
from bench._results import write_results
from bench.text import NUM_ROWS, corpus_settings
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane

ROUNDS = 20
STEPS_PER_ROUND = 12
PIECES_PER_STEP = 25
SMALL_OPERATIONS = 15_000
UNITS = {
    "text": ["dataplane.seq_len=1024", "dataplane.global_batch_size=64"],
    "samples": ["mixture.unit=samples", "dataplane.global_batch_size=256"],
}
MODES = {"thread": 0, "process": 1}


def main() -> None:
    """Measure, print and write all figures."""
    pieces = {"1 ms of Python": _python_pieces(), "15,000 small tensor operations": _tensor_pieces()}
    results: list[dict[str, Any]] = []
    print(f"{'step':32} {'unit':8} {'read by':8} {'p50 ratio':>10} {'p99 ratio':>10} {'call p50':>10} {'p99':>10}")
    for unit, words in UNITS.items():
        for name, step in pieces.items():
            for result in _compare(step, words):
                results.append({"step": name, "unit": unit, **result})
                ratios = f"{result['p50_ratio']:10.3f} {result['p99_ratio']:10.3f}"
                calls = f"{result['call_p50_ms']:7.2f} ms {result['call_p99_ms']:7.2f} ms"
                print(f"{name:32} {unit:8} {result['mode']:8} {ratios} {calls}", flush=True)
    write_results("trainer_thread", {"results": results})


def _compare(step: Callable[[], list[float]], words: list[str]) -> Iterator[dict[str, Any]]:
    """Return the medians over all rounds of the ratios of p50 and p99, with a plane and without."""
    settings = corpus_settings(make_rows(NUM_ROWS))
    with ExitStack() as planes:
        batches = {
            mode: iter(planes.enter_context(DataPlane.open(compose([*settings, *words, f"dataplane.workers={count}"]))))
            for mode, count in MODES.items()
        }
        for mode in MODES:
            next(batches[mode])
        times: dict[str, list[Any]] = {mode: [] for mode in ("none", *MODES)}
        calls: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(ROUNDS):
            times["none"].append(np.quantile([t for _ in range(STEPS_PER_ROUND) for t in step()], (0.5, 0.99)))
            for mode in MODES:
                measured: list[float] = []
                for _ in range(STEPS_PER_ROUND):
                    began_s = time.thread_time()
                    batch = next(batches[mode])
                    calls[mode].append(time.thread_time() - began_s)
                    measured += step()
                    del batch
                times[mode].append(np.quantile(measured, (0.5, 0.99)))
    for mode in MODES:
        ratios = np.median(np.array(times[mode]) / np.array(times["none"]), axis=0)
        yield {
            "mode": mode,
            "p50_ratio": float(ratios[0]),
            "p99_ratio": float(ratios[1]),
            "p99_without_ms": statistics.median(t[1] for t in times["none"]) * 1e3,
            "call_p50_ms": float(np.quantile(calls[mode], 0.5)) * 1e3,
            "call_p99_ms": float(np.quantile(calls[mode], 0.99)) * 1e3,
        }


def _clock_s() -> float:
    """Return a time that stands still while this thread could run and has no core."""
    # Nanoseconds on a core, and nanoseconds in the queue of a core.
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.perf_counter() - int(waited_ns) / 1e9


def _python_pieces() -> Callable[[], list[float]]:
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
    total = 0
    for i in range(iterations):
        total += i & 3
    return total


def _tensor_pieces() -> Callable[[], list[float]]:
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
    main()
