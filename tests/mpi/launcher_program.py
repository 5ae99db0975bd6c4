"""A training script as users write it, without `run_guarded`. Arguments: MODE OVERRIDES…

table  open data planes in many ways, before and after a process group exists, and print what became of each as JSON
loop   create the process group if torchrun started this process, serve one batch, print who got which positions
fail   as `loop`, but rank 1 writes the time to $FAILED_AT and raises an exception after two batches; the others go on
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtera_hpc import DataPlane, UserError, compose

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ


def create_process_group() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def open_and_describe(overrides: list[str], **arguments: Any) -> dict[str, Any]:
    """Return what the first batch is like, or with which exit code and message the process would have ended."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), DataPlane.open(compose(overrides), **arguments) as plane:
            batch = next(iter(plane))
            return {
                "code": 0,
                "ranks": plane.config.dataplane.global_batch_size // plane.local_batch_size,
                "positions": batch.positions.tolist(),
            }
    except SystemExit as end:
        return {"code": end.code, "message": messages.getvalue()}
    except UserError as error:  # In a job of one process.
        return {"code": error.exit_code, "message": f"{type(error).__name__}: {error}"}


def print_table(overrides: list[str]) -> None:
    from mpi4py import MPI

    def row(name: str, *more: str, **arguments: Any) -> None:
        print(
            json.dumps({"row": name, **open_and_describe([*overrides, *more], **arguments)}) + "\n", end="", flush=True
        )

    for kind in ("auto", "local", "mpi", "torch"):
        row(kind, f"dataplane.comm={kind}")
    row("COMM_WORLD", comm=MPI.COMM_WORLD)
    row("COMM_SELF", comm=MPI.COMM_SELF)
    row("COMM_SELF subset", comm=MPI.COMM_SELF, subset=True)
    if UNDER_TORCHRUN:
        import torch.distributed as dist

        create_process_group()
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        for kind in ("auto", "local", "mpi", "torch"):
            row(f"{kind} with group", f"dataplane.comm={kind}")
        row("WORLD", comm=dist.group.WORLD)
        row("part", comm=alone)
        row("part subset", comm=alone, subset=True)


def serve(overrides: list[str], fails: bool) -> None:
    if UNDER_TORCHRUN:
        create_process_group()
    rank = int(os.environ.get("RANK", os.environ.get("PMI_RANK", "0")))
    with DataPlane.open(compose(overrides)) as plane:
        for batch in plane:
            if not fails:
                print(json.dumps({"positions": batch.positions.tolist()}) + "\n", end="", flush=True)
                break
            if batch.step == 2 and rank == 1:
                Path(os.environ["FAILED_AT"]).write_text(repr(time.time()))
                raise ValueError("broken on purpose")


def validate(overrides: list[str]) -> None:
    if UNDER_TORCHRUN:
        create_process_group()
    with DataPlane.open(compose(overrides)) as plane:
        held_out = plane.held_out()
        for _ in held_out.batches():
            pass
        held_out.reduce(0)


def main(environment: Mapping[str, str] = os.environ) -> None:
    mode, *overrides = sys.argv[1:]
    if mode == "table":
        print_table(overrides)
    elif mode == "validate":
        validate(overrides)
    else:
        serve(overrides, fails=mode == "fail")


main()
