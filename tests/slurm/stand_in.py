"""A small program that cluster tests run instead of the trainer: its ranks step together, save on request, and stop.

stand_in.py STEPS SECONDS_PER_STEP FAIL_AT_STEP HOLD_AT_STEP

Rank 1 kills itself at FAIL_AT_STEP. The first attempt waits at HOLD_AT_STEP until a stop is requested or `control/go`
exists, so that a test can act while the run is under way. Both are -1 for never.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

# Slurm may send its warning while this program imports MPI.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

import numpy as np  # noqa: E402

from mixtera_hpc.comm.communicator import Communicator  # noqa: E402
from mixtera_hpc.comm.failure_watch import start_failure_watch  # noqa: E402
from mixtera_hpc.comm.launcher import open_communicator, run_guarded  # noqa: E402
from mixtera_hpc.errors import SavedAndStopped  # noqa: E402

FAILING_RANK = 1


class StandIn:
    """One rank: it sleeps through its steps and saves when a signal or `control/stop` asks for it."""

    def __init__(self, comm: Communicator, folder: Path, attempt: int) -> None:
        self.comm = comm
        self.folder = folder
        self.attempt = attempt
        self.latest = folder / "checkpoints/LATEST"
        self.stop_requested = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self.request_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])

    def request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def hold(self) -> None:
        control = self.folder / "control"
        while not (self.stop_requested or (control / "stop").exists() or (control / "go").exists()):
            time.sleep(0.05)

    def run(self, num_steps: int, step_s: float, fail_at: int, hold_at: int) -> None:
        for name in ("checkpoints", "metrics"):
            (self.folder / name).mkdir(exist_ok=True)
        self.comm.Barrier()
        first = int(self.latest.read_text().split("_")[1]) if self.latest.exists() else 0
        print(f"rank {self.comm.rank} of {self.comm.size} on {self.comm.hostname} from step {first}")
        with start_failure_watch(self.comm, self.folder / f"attempts/{self.attempt:03d}/failure.json") as watch:
            for step in range(first, num_steps):
                time.sleep(step_s)
                if step == fail_at and self.comm.rank == FAILING_RANK:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == hold_at and self.attempt == 1:
                    self.hold()
                self.end_step(step)
                watch.step(step)

    def end_step(self, step: int) -> None:
        if self.comm.rank == 0:
            with (self.folder / "metrics/steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "tokens_per_s": 1000.0, "time": time.time()}) + "\n")
            self.stop_requested |= (self.folder / "control/stop").exists()
        if self.comm.Allreduce(np.array([self.stop_requested], np.int64), "max")[0]:
            if self.comm.rank == 0:
                self.latest.write_text(f"step_{step + 1:08d}")
            raise SavedAndStopped(f"saved after step {step}")


def main() -> int:
    num_steps = int(sys.argv[1])
    step_s = float(sys.argv[2])
    fail_at, hold_at = map(int, sys.argv[3:5])
    comm = open_communicator()
    rank = StandIn(comm, Path(os.environ["MIXTERA_RUN_FOLDER"]), int(os.environ["MIXTERA_ATTEMPT"]))
    return run_guarded(comm, lambda: rank.run(num_steps, step_s, fail_at, hold_at))


if __name__ == "__main__":
    sys.exit(main())
