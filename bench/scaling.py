"""CPU time, bytes and messages of plans and reductions on 1 to 64 real ranks, next to the scaling model.

    python -m bench scaling

Every number of ranks is one job of mpiexec in a network namespace of its own, which needs root. The ranks talk over
its loopback device, so that the kernel counts all bytes and packets of the job and nothing else. Latencies are not
measured: the ranks share the cores of one machine. Prints a table and writes bench/out/scaling.json.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench._results import write_results
from mixtera_hpc.dataplane.steps.reduction.stage_times import maxima_of
from mixtera_hpc.report.scaling.scaling_model import AGREEMENT_BYTES, broadcast_bytes, reduction_bytes

DOMAINS = 100
RANKS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 10
MODELLED_RANKS = (64, 1024, 16384)
LIMIT_S = 300
HEADER_BYTES = 66
"""Ethernet, IP and TCP headers of a packet."""

OVER_LOOPBACK = {
    "MPIR_CVAR_NOLOCAL": "1",
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "lo",
}
"""MPICH sends all messages through the network, also between ranks of one machine."""


def main() -> None:
    """Measure, print and write all results."""
    jobs = [measure(num_ranks) for num_ranks in RANKS]
    print(
        f"{'ranks':>5}  {'operation':<10} {'CPU µs/rank':>12} {'bytes':>11} {'model':>11} {'ratio':>6} {'packets':>8}"
    )
    for job in jobs:
        for name, modelled in model_bytes(job["ranks"]).items():
            row = job[name]
            payload = row["bytes"] - HEADER_BYTES * row["packets"]
            ratio = f"{payload / modelled:.2f}" if modelled else "–"
            print(
                f"{job['ranks']:>5}  {name:<10} {row['mean_cpu_us']:>12.0f} {payload:>11,.0f} {modelled:>11,.0f} "
                f"{ratio:>6} {row['packets']:>8.0f}"
            )
    unpacking = {num_ranks: unpack_us(num_ranks) for num_ranks in MODELLED_RANKS}
    for num_ranks, cost_us in unpacking.items():
        print(f"{num_ranks:>5}  times of all ranks, per step: {cost_us:.0f} µs on rank 0")
    write_results("scaling", {"jobs": jobs, "unpack_us": unpacking})


def model_bytes(num_ranks: int) -> dict[str, int]:
    """Return the bytes that the model expects on the network, over all ranks, per operation."""
    others = num_ranks - 1
    return {
        "broadcast": others * broadcast_bytes(DOMAINS),
        "reduction": 2 * others * reduction_bytes(DOMAINS, num_ranks),
        # Short messages go to every partner of a recursive doubling as they are.
        "agreement": num_ranks * math.ceil(math.log2(num_ranks)) * AGREEMENT_BYTES,
    }


def measure(num_ranks: int) -> dict[str, dict[str, float]]:
    """Run one job and return what it measured."""
    python = Path(sys.executable)
    job = [python.with_name("mpiexec"), "-n", num_ranks, python, "-m", "bench._scaling_rank", DOMAINS, REPEATS]
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *map(str, job)]
    done = subprocess.run(
        command, env={**os.environ, **OVER_LOOPBACK}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        raise SystemExit(f"{num_ranks} ranks: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def unpack_us(num_ranks: int) -> float:
    """Return the CPU time that rank 0 takes for the times of all ranks; the fastest of several rounds."""
    packed = np.arange(num_ranks, dtype=np.int64)
    rounds = []
    for _ in range(20):
        began = time.process_time()
        buffer = np.concatenate([np.zeros(num_ranks, np.int64), packed])
        maxima_of(buffer[:num_ranks])
        rounds.append(time.process_time() - began)
    return min(rounds) * 1e6


if __name__ == "__main__":
    main()
