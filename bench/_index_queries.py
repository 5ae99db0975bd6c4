"""Queries and plans over a large index: CPU time and memory of whole processes, and how much zones prune."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench._billion_index import make_index, make_shards
from bench._corpus import FOLDER, make_number_rows
from bench._figures import FigureLine, at_most
from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index

__all__ = ["number_lines", "query_lines"]

ROUNDS = 3
GIB = 1 << 30
VERB = [sys.executable, "-m", "mixtera_hpc"]


def query_lines(num_blocks: int) -> Iterator[FigureLine]:
    """Measure a query and a plan in processes of one thread, including Python's start.

    CPU seconds of one thread are what the verb takes on an idle machine.
    """
    samples = num_blocks * 250 / 1e9
    for mixed, shape in ((1, "stored source by source"), (10, "shuffled, 50 combos a block")):
        # Built in a separate process: the memory peak of this process would count for all processes that it starts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            path = pool.submit(make_index, FOLDER, num_blocks, mixed).result()
        overrides = ["mixture.unit=samples", f"index.path={path}", "query.where=\"language in ['en', 'de']\""]
        cpu_s, peak_bytes = _measure_verb("query", *overrides)
        name = f"open + query, {samples:.2g}e9 samples, {shape}"
        yield at_most(name, cpu_s, "s", "goal", 2)
        yield at_most(name + ", memory", peak_bytes / GIB, "GiB", "goal", 1)

    path = make_index(FOLDER, num_blocks, 1)
    root = make_shards(FOLDER, path)
    overrides = ["mixture.unit=samples", "mixture.group_by=[source]", f"index.path={path}", f"data.root={root}"]
    cpu_s, _ = _measure_verb("plan", *overrides, "training.num_steps=100000")
    yield at_most(f"plan, {samples:.2g}e9 samples, 10 domains, 100,000 steps", cpu_s, "s", "goal", 5)


def number_lines(num_rows: int) -> Iterator[FigureLine]:
    """Show what share of the blocks zones prune: `day` is sorted on disk, `quality` is not."""
    path = _number_index(num_rows)
    for where in ("1000 <= day < 1300", "quality >= 0.5"):
        overrides = ["mixture.unit=samples", f"index.path={path}", f'query.where="{where}"']
        done = subprocess.run([*VERB, "query", "--json", "--explain", *overrides], capture_output=True, check=True)
        explain: dict[str, Any] = json.loads(done.stdout)["explain"]
        yield FigureLine(
            what=f"{where}: {explain['samples_scanned']:,} of {num_rows:,} samples",
            ours=explain["count_s"] + explain["read_s"],
            unit="s",
            limit=f"blocks pruned, of {explain['blocks']:,}",
            other=explain["pruned_by_zones"],
            ratio=explain["pruned_by_zones"] / explain["blocks"],
            goal="shown",
            met=True,
        )


def _number_index(num_rows: int) -> Path:
    """Build the index of rows with two numbers; made once."""
    data = make_number_rows(num_rows)
    path = FOLDER / f"numbers-{num_rows}.h5"
    if not path.exists():
        numbers = [f"data.properties.{name}={{path:{name},kind:number}}" for name in ("day", "quality")]
        settings = [f"data.root={data}", f"index.path={path}", "mixture.unit=samples", "data.properties.s=s"]
        build_index(compose([*settings, *numbers]))
    return path


def _measure_verb(*words: str) -> tuple[float, int]:
    """Return CPU seconds (median) and peak memory in bytes (largest) of a verb; a first run warms up the file cache."""
    runs = [_run_process([*VERB, *words]) for _ in range(ROUNDS + 1)][1:]
    return statistics.median(seconds for seconds, _ in runs), max(peak for _, peak in runs)


def _run_process(command: list[str]) -> tuple[float, int]:
    """Run a command; return its CPU seconds and its peak memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
