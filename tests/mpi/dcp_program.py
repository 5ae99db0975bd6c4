"""Save and load a data plane with `torch.distributed.checkpoint`, and print what each rank is served afterwards.

mpiexec -n N python -m mpi4py dcp_program.py FOLDER OVERRIDES…
"""

import json
import sys
from pathlib import Path

import torch.distributed
import torch.distributed.checkpoint as dcp
from mpi4py import MPI

from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane


def main() -> None:
    folder = Path(sys.argv[1])
    config = compose(sys.argv[2:])
    comm = MPI.COMM_WORLD
    store = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=comm.rank, world_size=comm.size)

    expected = []
    with DataPlane.open(config, comm=comm) as plane:
        for batch in plane:
            if batch.step >= 5:
                expected.append(batch.digests)
            if batch.step == 4:
                dcp.save({"data": plane}, checkpoint_id=folder / "checkpoint")
            if batch.step == 8:
                break

    with DataPlane.open(config, comm=comm) as plane:
        # It asks every rank for its state first, then loads into what it got.
        dcp.load({"data": plane}, checkpoint_id=folder / "checkpoint")
        resumed_at = plane.next_step
        resumed = [batch.digests for _, batch in zip(range(4), plane, strict=False)]

    torch.distributed.destroy_process_group()
    same = comm.allgather(resumed == expected)
    if comm.rank == 0:
        print(json.dumps({"resumed_at": resumed_at, "same": same}))


main()
