"""Share units among ranks through one counter, and report the progress of all."""

import time
from collections.abc import Callable, Sequence

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanProgress

__all__ = ["share_units"]

NEXT_UNIT, UNITS_DONE, ROWS_DONE, BYTES_DONE = range(4)
"""The shared counters."""
WAIT_S = 0.05


def share_units(
    sizes: Sequence[int], write: Callable[[int], int], comm: Communicator, progress: ProgressCallback | None
) -> None:
    """Take units and write them until none is left. **Collective.**

    Args:
        sizes: bytes of every unit.
        write: writes the unit of a position, and returns its rows.
        comm: the ranks that share the work.
        progress: called on rank 0.
    """
    if not sizes:
        return
    counters = comm.Allocate_counters(4)
    total = sum(sizes)

    def report() -> int:
        done, rows, num_bytes = (counters.Fetch_and_add(i, 0) for i in (UNITS_DONE, ROWS_DONE, BYTES_DONE))
        if progress is not None:
            progress(ScanProgress(rows=rows, bytes_done=num_bytes, bytes_total=total))
        return done

    while (position := counters.Fetch_and_add(NEXT_UNIT, 1)) < len(sizes):
        rows = write(position)
        for counter, value in ((ROWS_DONE, rows), (BYTES_DONE, sizes[position]), (UNITS_DONE, 1)):
            counters.Fetch_and_add(counter, value)
        if comm.rank == 0:
            report()
    # Rank 0 reports for the others until they are done.
    while comm.rank == 0 and report() < len(sizes):
        time.sleep(WAIT_S)
    comm.Barrier()
    counters.Free()
