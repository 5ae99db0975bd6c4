"""Rank 1 finishes its first unit only after the other ranks have done all others."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.index.scan.parallel_scan import ScanTasks, scan_in_parallel
from mixtera_hpc.index.scan.scan_result import ScanResult

NONE = np.zeros(0, np.int64)
EMPTY = ScanResult(
    combos=[],
    blocks=dict.fromkeys(("offset", "length", "rows", "count"), NONE),
    cells=dict.fromkeys(("combo", "rows", "tokens"), NONE),
    zones={},
    samples={"combo": NONE},
    numbers={},
)


def main(folder: Path) -> None:
    comm = Mpi(MPI.COMM_WORLD)
    num_units = 8 * comm.size

    def scan(unit: int) -> Iterator[ScanResult]:
        deadline = time.monotonic() + 600
        while comm.rank == 1 and len(list(folder.glob("done-*"))) < num_units - 1:
            if time.monotonic() > deadline:
                raise TimeoutError(f"unit {unit} waits for {sorted(p.name for p in folder.glob('done-*'))}")
            time.sleep(0.01)
        (folder / f"done-{unit}").touch(exist_ok=False)
        yield EMPTY

    tasks = ScanTasks(sizes=[100] * num_units, missing=range(num_units), folder=folder, attempt=1, threads=1)
    reports: list[int] = []
    scan_in_parallel(tasks, scan, comm, lambda state: reports.append(state.bytes_done))
    if comm.rank == 0:
        assert reports[-1] == 100 * num_units and reports == sorted(reports), reports
        print("all done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
