"""Run all checks of the communicator suite on groups of the first 1, 2, … ranks; rank 0 prints the checks that pass.

mpiexec -n N python -m mpi4py communicator_program.py mpi
torchrun --nproc-per-node N communicator_program.py torch [--world], or python forked_ranks.py N …

With --world only on all ranks together.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.testing.communicators import CHECKS


def mpi_groups() -> Iterator[Communicator]:
    from mpi4py import MPI

    from mixtera_hpc.comm.mpi import Mpi

    world = Mpi.world()
    for size in range(1, world.size):
        group = MPI.COMM_WORLD.Split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
        if group != MPI.COMM_NULL:
            yield Mpi(group)
        world.Barrier()
    yield world


def torch_groups() -> Iterator[Communicator]:
    import torch.distributed as dist

    from mixtera_hpc.comm.torch_distributed import TorchDistributed

    dist.init_process_group("gloo")
    for size in range(1, 1 if "--world" in sys.argv else dist.get_world_size()):
        group = dist.new_group(list(range(size)))
        if dist.get_rank() < size:
            yield TorchDistributed(group)
        dist.barrier()
    yield TorchDistributed()
    dist.destroy_process_group()


def remaining_shared_memory() -> list[str]:
    """Return the names that do not vanish within some seconds; jobs beside this one have names for milliseconds."""
    deadline = time.monotonic() + 5
    while (names := [path.name for path in Path("/dev/shm").glob("mixtera-*")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return names


def main() -> None:
    groups = {"mpi": mpi_groups, "torch": torch_groups}[sys.argv[1]]
    for comm in groups():
        for check in CHECKS:
            check(comm)
            if comm.rank == 0:
                print(comm.size, check.__name__, flush=True)
        comm.Barrier()
        assert remaining_shared_memory() == []
        if comm.rank == 0:
            print(comm.size, "nodes", comm.size // comm.local_size, flush=True)
        comm.Free()


if __name__ == "__main__":
    main()
