"""Run all checks of the communicator suite on MPI ranks; rank 0 prints the name of each check that passes."""

from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.testing.communicators import CHECKS

comm = Mpi.world()
for check in CHECKS:
    check(comm)
    if comm.rank == 0:
        print(check.__name__, flush=True)
comm.Free()
