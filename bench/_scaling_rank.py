"""One rank of `python -m bench scaling`: the plans, reductions and agreements of a run, without data and without torch.

Prints one JSON object from rank 0.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS
from mixtera_hpc.dataplane.plans.plan_broadcast import PlanBroadcaster
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.steps.ready_agreement import OpenRequests, RankPosition, ReadyAgreement
from mixtera_hpc.dataplane.steps.reduction.step_buffer import StepContribution
from mixtera_hpc.dataplane.steps.reduction.step_reducer import RankFlags, StepReducer

CHUNK_STEPS = 10
POLL_S = 2e-3
"""Long, so that waiting costs little CPU time where there are more ranks than cores."""
SETTLE_S = 0.5
"""Time for acknowledgements to arrive before bytes are read."""

COUNTERS = Path("/proc/net/dev")

Action = Callable[[int], None]
"""One collective operation of all ranks, given its number: 0, 1, 2 and so on."""


def main() -> None:
    """Measure and print. **Collective.**"""
    num_domains, repeats = map(int, sys.argv[1:3])
    comm = open_communicator()

    def body() -> None:
        actions = {
            "broadcast": broadcast_action(comm, num_domains),
            "reduction": reduction_action(comm, num_domains),
            "agreement": agreement_action(comm),
        }
        measured = {name: measure(comm, action, repeats) for name, action in actions.items()}
        if comm.rank == 0:
            print(json.dumps({"ranks": comm.size, "domains": num_domains, **measured}))
        # The broadcasts of all ranks are complete, and so is everything else.
        comm.Barrier()

    raise SystemExit(run_guarded(comm, body))


def broadcast_action(comm: Communicator, num_domains: int) -> Action:
    """Return a function that waits for the plan of a chunk, given its number."""
    planner = Planner(
        capacity=np.full(num_domains, Planner.UNLIMITED),
        batch_schedule=BatchSchedule.constant(8 * comm.size),
        chunk_steps=CHUNK_STEPS,
        on_exhausted="repeat",
    )
    start = PlannerState.start(num_domains)
    empty_plan = ChunkPlan(
        chunk=0, first_step=0, num_steps=0, last=False, cursors=start.cursors, lags=start.lags, weights=start.lags
    )
    weights = np.full(num_domains, 1 / num_domains)
    plans = PlanBroadcaster(comm, planner, lambda chunk: weights, empty_plan)

    def broadcast(number: int) -> None:
        while plans.poll(number) is None:
            time.sleep(POLL_S)

    return broadcast


def reduction_action(comm: Communicator, num_domains: int) -> Action:
    """Return a function that reduces the losses of a step, given its number."""
    batch_slice = BatchSlice(group=comm.rank, num_groups=comm.size)
    reducer = StepReducer(comm, num_domains, lambda step: 8 * comm.size, batch_slice)
    contribution = StepContribution(rows=np.zeros((NUM_BUFFER_ROWS, num_domains), np.int64))

    def reduce(number: int) -> None:
        reducer.post(number, contribution, RankFlags(stop=False, save=False, digest=7))
        while not reducer.poll():
            time.sleep(POLL_S)

    return reduce


def agreement_action(comm: Communicator) -> Action:
    """Return a function that agrees on a ready batch, given its number."""
    agreement = ReadyAgreement(comm, 0)

    def agree(number: int) -> None:
        agreement.offer(RankPosition(number, number + 1))
        while not agreement.covers(number):
            agreement.poll(RankPosition(number, number + 1), 0.0, OpenRequests)
            time.sleep(POLL_S)

    return agree


def measure(comm: Communicator, action: Action, repeats: int) -> dict[str, float]:
    """Return CPU seconds of rank 0 and of all ranks, and bytes and packets of all ranks, per action. **Collective.**"""
    action(0)
    comm.Barrier()
    time.sleep(SETTLE_S)
    bytes_before, packets_before = sent_so_far()
    comm.Barrier()
    began = time.process_time()
    for number in range(1, 1 + repeats):
        action(number)
    own_s = time.process_time() - began
    time.sleep(SETTLE_S)
    bytes_after, packets_after = sent_so_far()
    total_us = int(comm.Allreduce(np.array([own_s * 1e6], np.int64))[0])
    return {
        "rank0_cpu_us": own_s / repeats * 1e6,
        "mean_cpu_us": total_us / comm.size / repeats,
        "bytes": (bytes_after - bytes_before) / repeats,
        "packets": (packets_after - packets_before) / repeats,
    }


def sent_so_far() -> tuple[int, int]:
    """Return bytes and packets that were sent over the loopback device of this network namespace."""
    line = next(line for line in COUNTERS.read_text().splitlines() if line.strip().startswith("lo:"))
    fields = line.split()
    return int(fields[1]), int(fields[2])


if __name__ == "__main__":
    main()
