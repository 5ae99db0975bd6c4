"""Serve step 2 from another plan on rank 1. Rank 0 polls the reductions early, the others wait for them late.

A barrier ends every step, as the reduction of gradients does in training. At the end rank r has started r reductions
more than rank 0, as where trainers hold different numbers of batches.

mpiexec -n N python -m mpi4py step_reducer_program.py
python forked_ranks.py N step_reducer_program.py
"""

import time

from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.steps.reduction.step_buffer import StepContribution
from mixtera_hpc.dataplane.steps.reduction.step_reducer import RankFlags, StepReducer


def main() -> None:
    comm = open_communicator(creates_group=True)

    def body() -> None:
        reducer = StepReducer(comm, 3, lambda step: 4, BatchSlice())

        def post(step: int) -> None:
            digest = 8 if comm.rank == 1 and step == 2 else 7
            flags = RankFlags(stop=False, save=False, digest=digest)
            reducer.post(step, StepContribution(), flags)

        for step in range(9):
            post(step)
            if comm.rank == 0:
                time.sleep(0.1)  # Long enough for the reduction to be complete when it is polled.
                reducer.poll()
            comm.Barrier()
        for step in range(9, 9 + comm.rank):
            post(step)
        reducer.wait_for(8)

    raise SystemExit(run_guarded(comm, body))


main()
