"""Cost of finding one rank's sequences, for 1 to 1,024 ranks.

    python -m bench slots

Every rank has 8 sequences of a step; steps are asked for 8 at a time, as the reading thread does. "All slots" expands
every sequence of the global batch. The last column is the longest time that one call held the interpreter's lock:
another thread asks for the lock every 50 µs. Prints a table and writes bench/out/slots.json.
"""

import sys
import threading
import time
from dataclasses import asdict, dataclass

import numpy as np

from bench._corpus import SHARES
from bench._results import write_results
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule

OWN_SEQUENCES = 8
STEPS_TOGETHER = 8
CHUNK_STEPS = 16
ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCost:
    """CPU time per step, the fastest of several rounds."""

    mixture: str
    num_ranks: int
    all_slots_us: float
    own_slots_us: float
    longest_stop_ms: float


def main() -> None:
    """Measure, print and write all results."""
    rng = np.random.default_rng(0)
    mixtures = {
        "7, SlimPajama": np.array(list(SHARES.values())),
        "100, Zipf": 1 / np.arange(1.0, 101),
        "1,000, Zipf": 1 / np.arange(1.0, 1001),
        "1,000, log-normal": rng.lognormal(0, 2, 1000),
    }
    print(f"{'domains, weights':<20} {'ranks':>6} {'all slots':>12} {'own slots':>12} {'longest stop':>14}")
    costs = []
    for name, weights in mixtures.items():
        for num_ranks in (1, 16, 1024):
            cost = measure(name, weights, num_ranks)
            costs.append(cost)
            print(
                f"{name:<20} {num_ranks:>6} {cost.all_slots_us:>9.0f} us {cost.own_slots_us:>9.0f} us "
                f"{cost.longest_stop_ms:>11.2f} ms"
            )
    write_results("slots", {"costs": [asdict(cost) for cost in costs]})


def measure(name: str, weights: np.ndarray, num_ranks: int) -> SlotCost:
    """Measure one mixture with one number of ranks."""
    planner = Planner(
        capacity=np.full(len(weights), Planner.UNLIMITED),
        batch_schedule=BatchSchedule.constant(OWN_SEQUENCES * num_ranks),
        chunk_steps=CHUNK_STEPS,
        on_exhausted="repeat",
    )
    plan, _ = planner.plan(PlannerState.start(len(weights)), weights)
    own_s = []
    all_s = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        expand_own_slots(planner, plan, num_ranks // 3)
        middle = time.process_time()
        planner.slots(plan)
        own_s.append(middle - begin)
        all_s.append(time.process_time() - middle)
    return SlotCost(
        mixture=name,
        num_ranks=num_ranks,
        all_slots_us=min(all_s) / CHUNK_STEPS * 1e6,
        own_slots_us=min(own_s) / CHUNK_STEPS * 1e6,
        longest_stop_ms=min(longest_stop(planner, plan, num_ranks // 3) for _ in range(ROUNDS)) * 1e3,
    )


def expand_own_slots(planner: Planner, plan: ChunkPlan, rank: int) -> None:
    """Compute the slots of one rank for all steps of `plan`."""
    order = planner.order(plan)
    for first_step in range(0, CHUNK_STEPS, STEPS_TOGETHER):
        steps = range(first_step, first_step + STEPS_TOGETHER)
        firsts = [step * planner.batch_schedule.size_at(step) + rank * OWN_SEQUENCES for step in steps]
        order.slots([(first, first + OWN_SEQUENCES) for first in firsts])


def longest_stop(planner: Planner, plan: ChunkPlan, rank: int) -> float:
    """Return the longest time in seconds that a call in the expansion of one rank's slots stopped this thread."""
    usual_interval = sys.getswitchinterval()
    sys.setswitchinterval(50e-6)
    worker = threading.Thread(target=expand_own_slots, args=(planner, plan, rank))
    worker.start()
    longest = 0.0
    previous = time.perf_counter()
    while worker.is_alive():
        now = time.perf_counter()
        longest = max(longest, now - previous)
        previous = now
    sys.setswitchinterval(usual_interval)
    return longest


if __name__ == "__main__":
    main()
