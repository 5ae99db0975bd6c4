"""Serve steps of a data plane on every rank, with losses that depend on the tokens only, and print the statistics.

mpiexec -n N python -m mpi4py plane_program.py FOLDER ATTEMPT STEPS [OVERRIDES…]
torchrun --nproc-per-node N plane_program.py FOLDER ATTEMPT STEPS [OVERRIDES…]

Resumes from a state saved in FOLDER, and saves its state there at the end.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.launcher import open_communicator
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane


def load(folder: Path) -> dict[str, object] | None:
    path = folder / "state.npz"
    return {"plane": np.fromfile(path, np.uint8)} if path.exists() else None


def save(folder: Path, rank: int, state: dict[str, NDArray[np.uint8]]) -> None:
    if rank == 0:
        state["plane"].tofile(folder / "state.npz")


def main() -> None:
    folder = Path(sys.argv[1])
    attempt = int(sys.argv[2])
    steps = int(sys.argv[3])
    comm = open_communicator(creates_group=True)
    with DataPlane.open(compose(sys.argv[4:]), comm=comm, folder=RunFolder(folder), attempt=attempt) as plane:
        if (state := load(folder)) is not None:
            plane.load_state_dict(state if comm.rank == 0 else None)
        statistics = []
        for batch in plane:
            targets = batch.tokens[:, 1:]
            loss = 1.0 + (targets % 97) / 97 + 5.0 / (1 + batch.domain_ids[:, None] + batch.step)
            half = len(loss) // 2
            plane.record(batch, loss[:half], rows=slice(0, half))
            plane.record(batch, loss[half:], rows=slice(half, None))
            statistics += plane.completed_statistics()
            if plane.stop_requested() or batch.step + 1 == steps:
                break
        save(folder, comm.rank, plane.state_dict())
        statistics += plane.completed_statistics()
        if comm.rank == 0:
            sums = [[s.step, s.loss_sum.tolist(), s.num_tokens.tolist()] for s in statistics]
            print(json.dumps({"next_step": plane.next_step, "statistics": sums}))


main()
