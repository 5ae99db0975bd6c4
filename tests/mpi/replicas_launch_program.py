"""A user's program with `Replicas` and no argument, for any launcher. Arguments: MODE OVERRIDES…

serve  print the process group, the variables, and the positions of the first batch, as one line of JSON per rank
fail   rank 1 writes the time to $FAILED_AT and raises an exception inside `Replicas` and outside of a data plane; the
       others wait for it
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtera_hpc import DataPlane, Replicas, compose

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def main() -> None:
    mode, *overrides = sys.argv[1:]
    before = variables()
    with Replicas() as replicas:
        if mode == "fail":
            if replicas.comm.rank == 1:
                Path(os.environ["FAILED_AT"]).write_text(repr(time.time()))
                raise ValueError("broken on purpose")
            replicas.comm.Barrier()
        total = torch.ones(1)
        replicas.all_reduce(total)
        row: dict[str, Any] = {"sum": total.item(), "rank": replicas.comm.rank, "inside": variables()}
        row["has_group"] = dist.is_initialized()
        with DataPlane.open(compose(overrides)) as plane:
            row["positions"] = next(iter(plane)).positions.tolist()
    row["restored"] = variables() == before
    row["has_group_after"] = dist.is_initialized()
    print(json.dumps(row) + "\n", end="", flush=True)


main()
