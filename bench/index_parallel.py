"""Measure index builds by 1, 2, 4 and 8 ranks: rate, balance, memory, and whether the files are equal.

    python -m bench index_parallel

The *busy* time of a rank is the CPU time of its process from the start of the build. If every rank has a core, a build
takes the busy time of its busiest rank. On a shared machine, and for more ranks than cores, wall time says less, so
both are shown, each the best of three. Peer: one rank. Writes bench/out/index_parallel.json.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench._corpus import make_rows, make_tokenizer
from bench._results import write_results
from mixtera_hpc.cli.collection import compose_build
from mixtera_hpc.comm.launcher import open_communicator
from mixtera_hpc.index.build.build import build_index

__all__ = ["best_build"]

NUM_ROWS = 1_000_000
REPEATS = 3
PROPERTY = "data.properties.source=meta.redpajama_set_name"


def main() -> None:
    """Measure and print all numbers of ranks, with and without token counts."""
    data = make_rows(NUM_ROWS)
    builds = [best_build(data, ranks, tokenizer) for tokenizer in (None, make_tokenizer()) for ranks in (1, 2, 4, 8)]
    print(f"{NUM_ROWS:,} rows of 1.1 kB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("tokens  ranks  seconds  MB/s  busiest rank  speed-up  finish  peak MB of a rank  file")
    for build in builds:
        alone = next(b for b in builds if b["tokens"] == build["tokens"] and b["ranks"] == 1)
        build["speed_up"] = alone["busiest_s"] / build["busiest_s"]
        print(_table_row(build))
    write_results("index_parallel", {"builds": builds})


def _table_row(build: dict[str, Any]) -> str:
    tokens = "yes" if build["tokens"] else "no"
    megabytes_per_s = build["bytes"] / build["wall_s"] / 1e6
    return (
        f"{tokens:6}  {build['ranks']:5}  {build['wall_s']:7.2f}  {megabytes_per_s:4.0f}  {build['busiest_s']:12.2f}"
        f"  {build['speed_up']:8.2f}  {build['finish_s']:6.2f}  {build['peak_mb']:17.0f}  {build['file']}"
    )


def best_build(data: Path, ranks: int, tokenizer: Path | None) -> dict[str, Any]:
    """Return the fastest of some builds, all of which write the same file."""
    builds = [_build(data, ranks, tokenizer) for _ in range(REPEATS)]
    assert len({build["file"] for build in builds}) == 1
    fastest = min(builds, key=lambda build: build["busiest_s"])
    return fastest | {"wall_s": min(build["wall_s"] for build in builds)}


def _build(data: Path, ranks: int, tokenizer: Path | None) -> dict[str, Any]:
    """Build an index with `ranks` ranks in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.h5"
        overrides = [f"data.root={data}", f"index.path={index}", PROPERTY]
        if tokenizer:
            overrides.append(f"dataplane.tokenizer={tokenizer}")
        mpiexec = Path(sys.executable).with_name("mpiexec")
        program = [sys.executable, "-m", "mpi4py", "-m", "bench.index_parallel", folder, *overrides]
        subprocess.run([mpiexec, "-n", str(ranks), *program], check=True)
        figures = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
        report = next(rank["report"] for rank in figures if rank["rank"] == 0)
        return {
            "ranks": ranks,
            "tokens": tokenizer is not None,
            "bytes": report["bytes_read"],
            "wall_s": report["elapsed_s"],
            "finish_s": report["finish_s"],
            "busiest_s": max(rank["busy_s"] for rank in figures),
            "peak_mb": max(rank["peak_mb"] for rank in figures),
            "file": hashlib.blake2b(index.read_bytes(), digest_size=6).hexdigest(),
        }


def _run_rank(folder: Path, overrides: list[str]) -> None:
    """Be one rank of a measured build, and write its figures."""
    comm = open_communicator("mpi")
    config = compose_build(overrides)
    comm.Barrier()
    began_s = time.process_time()
    report = build_index(config, comm)
    figures = {
        "rank": comm.rank,
        "busy_s": time.process_time() - began_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "report": msgspec.to_builtins(report),
    }
    (folder / f"rank-{comm.rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), sys.argv[2:])
