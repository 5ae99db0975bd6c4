"""Every check of the communicator suite on real ranks, in one launch: rank 0 prints what passed."""

from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.testing.communicators import CHECKS

comm = Mpi.world()
for check in CHECKS:
    check(comm)
    if comm.rank == 0:
        print(check.__name__, flush=True)
comm.Free()
