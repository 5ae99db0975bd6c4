"""Report the MPI library, the number of ranks that see each other, and the speed of one broadcast.

`mixtera-hpc doctor` runs `python -m mixtera_hpc.comm.probe` in a separate process, because importing MPI aborts Python
on some login nodes.
"""

import json
import sys
import time

import numpy as np

from mixtera_hpc.comm.launcher import check_world_size
from mixtera_hpc.comm.mpi import Mpi

__all__ = ["main"]

BROADCAST_BYTES = 32 * 2**20
REPEATS = 5
"""Number of broadcasts; the fastest one is reported."""


def main() -> None:
    """Print one JSON object from rank 0. **Collective.**"""
    comm = Mpi.world()
    check_world_size(comm)
    buffer = np.ones(BROADCAST_BYTES // 8, np.int64)
    durations_s = []
    for _ in range(REPEATS):
        comm.Barrier()
        start = time.perf_counter()
        comm.Bcast(buffer)
        comm.Barrier()
        durations_s.append(time.perf_counter() - start)
    if comm.rank == 0:
        facts = {
            "library": comm.library(),
            "size": comm.size,
            "local_size": comm.local_size,
            "broadcast_bytes_per_s": BROADCAST_BYTES / min(durations_s) if comm.size > 1 else None,
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    comm.Free()


if __name__ == "__main__":
    main()
