"""Train an own loop that may get stuck. Arguments: MODE FOLDER OVERRIDES…

$HANGING_SHARD: replaced by a pipe, which nobody writes to, once the index is open. $STUCK_RANK: the rank that sleeps in
mode `trainer`. Writes its process id to FOLDER/pid_RANK, and FOLDER/step_3_RANK after its third step.
"""

import os
import sys
import time
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane


def main() -> None:
    mode = sys.argv[1]
    folder = Path(sys.argv[2])
    config = compose(sys.argv[3:])
    with DataPlane.open(config, folder=RunFolder(folder)) as plane:
        rank = plane._resources.comm.rank
        if "HANGING_SHARD" in os.environ:
            if rank == 0:
                shard = Path(os.environ["HANGING_SHARD"])
                shard.unlink()
                os.mkfifo(shard)
            plane._resources.comm.Barrier()
        (folder / f"pid_{rank}").write_text(str(os.getpid()))
        for number, batch in enumerate(plane, 1):
            time.sleep(1.5 if mode == "slow" else 0.05)
            plane.record(batch, 1.0 + batch.tokens[:, 1:] % 7)
            if number == 3:
                (folder / f"step_3_{rank}").touch()
                if mode == "trainer" and rank == int(os.environ["STUCK_RANK"]):
                    time.sleep(600)
            if plane.stop_requested() or number == (5 if mode == "slow" else 100_000):
                break
    print("ended in order")


main()
