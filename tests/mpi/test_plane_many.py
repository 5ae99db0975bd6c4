"""Many data planes can be opened one after the other: MPI has some 2,000 communicators; each plane frees its own."""

import subprocess
import sys
from pathlib import Path

MPIEXEC = Path(sys.executable).with_name("mpiexec")
PROGRAM = """
import sys
from mpi4py import MPI
from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
given = {"none": None, "mpi4py": MPI.COMM_WORLD, "ours": Mpi(MPI.COMM_WORLD)}
taken = []
try:
    while True:
        taken.append(MPI.COMM_WORLD.Dup())
except MPI.Exception:
    for comm in taken[-40:]:
        comm.Free()
config = compose(sys.argv[1:])
for name, comm in given.items():
    for _ in range(12):
        with DataPlane.open(config, comm=comm) as plane:
            next(iter(plane))
    if MPI.COMM_WORLD.rank == 0:
        print(name)
"""


def test_a_plane_frees_every_communicator_it_made(collection: list[str]) -> None:
    """There is room for 40 communicators, of which a plane needs most: one that it left behind would be missed soon."""
    small = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]
    words = [MPIEXEC, "-n", "2", sys.executable, "-m", "mpi4py", "-c", PROGRAM, *collection, *small]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.split() == ["none", "mpi4py", "ours"]
