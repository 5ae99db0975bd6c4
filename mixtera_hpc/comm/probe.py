"""`python -m mixtera_hpc.comm.probe`: what MPI this is, how many ranks see each other, how fast one broadcast is.

Started by `mixtera-hpc doctor` as a process of its own: importing MPI aborts Python on some login nodes.
"""

import json
import sys
import time

import numpy as np

from mixtera_hpc.comm.mpi import Mpi

__all__ = ["main"]

BROADCAST_BYTES = 32 * 2**20
REPEATS = 5


def main() -> None:
    """Print one JSON object from rank 0. **Collective.**"""
    comm = Mpi.world()
    buffer = np.ones(BROADCAST_BYTES // 8, np.int64)
    durations = []
    for _ in range(REPEATS):
        comm.Barrier()
        start = time.perf_counter()
        comm.Bcast(buffer)
        comm.Barrier()
        durations.append(time.perf_counter() - start)
    if comm.rank == 0:
        facts = {
            "library": comm.library(),
            "size": comm.size,
            "local_size": comm.local_size,
            "broadcast_bytes_per_s": BROADCAST_BYTES / min(durations) if comm.size > 1 else None,
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    comm.Free()


if __name__ == "__main__":
    main()
