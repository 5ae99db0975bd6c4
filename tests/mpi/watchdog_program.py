"""Train an own loop that may get stuck. Arguments: MODE FOLDER OVERRIDES…

$HANGING_SHARD: replaced by a pipe, which nobody writes to, once the index is open. $HANGING_FOLDER: its shards that
are not open are replaced after step 3. $STUCK_RANK: the rank that sleeps in mode `trainer`. In
mode `save`, a request to save is answered while a batch is missing. Writes its process id to FOLDER/pid_RANK, and
FOLDER/step_3_RANK after its third step, and the number of its steps to FOLDER/steps_RANK. At the end rank 0 saves the
state.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import Batch, DataPlane


def hang(shards: list[Path]) -> None:
    for shard in shards:
        shard.unlink()
        os.mkfifo(shard)


def without_open_files(shards: list[Path]) -> list[Path]:
    """Return the shards that no process reads: those that are open would be found to have changed."""
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(str(link.readlink()))
    return [shard for shard in shards if str(shard) not in held]


def batches(plane: DataPlane, folder: Path, mode: str) -> Iterator[Batch]:
    while True:
        yield from plane.batches(pause_to_save=mode == "save")
        if not plane.is_interrupted or plane.stop_requested():
            return
        assert plane.save_requested()
        save(plane, folder)


def save(plane: DataPlane, folder: Path) -> None:
    state = plane.state_dict()["plane"]
    if plane._resources.comm.rank == 0:
        state.tofile(folder / ".state")
        (folder / ".state").rename(folder / "state")


def main() -> None:
    mode = sys.argv[1]
    folder = Path(sys.argv[2])
    config = compose(sys.argv[3:])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import torch.distributed  # Only torchrun needs it: importing torch takes seconds.

        torch.distributed.init_process_group("gloo")
    with DataPlane.open(config, folder=RunFolder(folder)) as plane:
        rank = plane._resources.comm.rank
        if "HANGING_SHARD" in os.environ:
            if rank == 0:
                hang([Path(os.environ["HANGING_SHARD"])])
            plane._resources.comm.Barrier()
        (folder / f"pid_{rank}").write_text(str(os.getpid()))
        gradients = plane._resources.comm.Dup()
        (folder / f"steps_{rank}").write_text("0")
        for number, batch in enumerate(batches(plane, folder, mode), 1):
            time.sleep(1 if mode == "slow" else 0.05)
            gradients.Barrier()
            plane.record(batch, 1.0 + batch.tokens[:, 1:] % 7)
            (folder / f"steps_{rank}").write_text(str(number))
            if number == 3:
                (folder / f"step_3_{rank}").touch()
                if mode == "trainer" and rank == int(os.environ["STUCK_RANK"]):
                    time.sleep(600)
                if "HANGING_FOLDER" in os.environ and rank == 0:
                    hang(without_open_files(sorted(Path(os.environ["HANGING_FOLDER"]).rglob("*.jsonl"))))
            if plane.stop_requested() or number == (10 if mode == "slow" else 100_000):
                break
        save(plane, folder)
    print("ended in order")


main()
