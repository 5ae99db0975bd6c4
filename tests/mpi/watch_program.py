"""Run steps with a failure watch on every rank, then let rank 2 fail as MODE says. Arguments: MODE FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

from mixtera_hpc.comm.failure_watch import FailureWatch, start_failure_watch
from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.errors import SavedAndStopped

FAILING_RANK = 2


def fail(mode: str) -> None:
    if mode == "killed launcher":
        print("ready", flush=True)
        time.sleep(60)
    if mode == "peers fail first":  # The libraries of the other ranks notice before the kernel ends it.
        time.sleep(0.1)
    if mode in ("SIGKILL", "peers fail first"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "exit":
        os._exit(3)
    raise ValueError("a shard is truncated")


def main() -> int:
    mode = sys.argv[1]
    folder = Path(sys.argv[2])
    comm = open_communicator(creates_group=True)

    def steps(watch: FailureWatch) -> None:
        for step in range(5):
            comm.Barrier()
            watch.step(step)
        if mode == "saved":
            raise SavedAndStopped("saved at step 5")
        if mode == "clean":
            return
        if comm.rank == FAILING_RANK:
            fail(mode)
        if mode == "peers fail first":
            raise RuntimeError("Connection reset by peer")
        comm.Barrier()

    def body() -> None:
        with start_failure_watch(comm, folder / "failure.json") as watch:
            steps(watch)

    return run_guarded(comm, body)


if __name__ == "__main__":
    sys.exit(main())
