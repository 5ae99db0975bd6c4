"""Run a program on N ranks with the variables of torchrun; the ranks are forks, so that libraries are imported once.

forked_ranks.py N PROGRAM ARGUMENTS…

For tests of what ranks do, not of how torchrun starts them. After the first failure, the other ranks are killed; all
are killed if this process ends, for example because a test has waited too long.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import hydra  # noqa: F401 - imported once, like the next ones, instead of by every rank
import torch.distributed.device_mesh

import mixtera_hpc.dataplane.plane
import mixtera_hpc.testing.communicators  # noqa: F401

PR_SET_PDEATHSIG = 1  # From linux/prctl.h.


def free_port() -> int:
    """Return a port that nobody else is given: those that the kernel hands out begin at 32768."""
    for port in range(20000 + os.getpid() % 12000, 32768):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def run_rank(rank: int, num_ranks: int, port: int) -> int:
    """Run the program of `sys.argv` as one rank and return its exit code."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": str(port)})
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> int:
    num_ranks = int(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    assert torch.distributed.is_available()
    port = free_port()
    running = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os._exit(run_rank(rank, num_ranks, port))
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
