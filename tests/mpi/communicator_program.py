"""Run all checks of the communicator suite on groups of the first 1, 2, … ranks; rank 0 prints the checks that pass.

mpiexec -n N python -m mpi4py communicator_program.py mpi
torchrun --nproc-per-node N communicator_program.py torch [--world], or python forked_ranks.py N …

With --world only on all ranks together.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.testing.communicators import CHECKS

OPENED: set[str] = set()
"""Shared memory that this rank has opened by name."""


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


def record_shared_memory(event: str, arguments: tuple[object, ...]) -> None:
    """Note the names of shared memory that this process opens, as an audit hook. Other jobs have such names as well."""
    if event == "open" and str(arguments[0]).startswith("/dev/shm/mixtera-"):
        OPENED.add(str(arguments[0]))


def main() -> None:
    sys.addaudithook(record_shared_memory)
    groups = {"mpi": mpi_groups, "torch": torch_groups}[sys.argv[1]]
    for comm in groups():
        for check in CHECKS:
            check(comm)
            if comm.rank == 0:
                print(comm.size, check.__name__, flush=True)
        comm.Barrier()
        assert [path for path in OPENED if Path(path).exists()] == []
        if comm.rank == 0:
            print(comm.size, "nodes", comm.size // comm.local_size, flush=True)
        comm.Free()


if __name__ == "__main__":
    main()
