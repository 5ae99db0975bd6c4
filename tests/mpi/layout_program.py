"""Serve a run in several layouts of model-parallel ranks; rank 0 prints what each rank got and the statistics.

python forked_ranks.py 8 layout_program.py torch OVERRIDES…: a mesh of dp2 × pp2 × cp2 in every order
mpiexec -n 4 python -m mpi4py layout_program.py mpi OVERRIDES…: two groups of two, neighbours and not
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane

STEPS = 5
HALVES = (slice(0, 8), slice(8, 16))


def serve(config: Config, delivery: str, parts: list[slice], **layout: Any) -> dict[str, Any]:
    served = []
    config = replace(config, dataplane=replace(config.dataplane, delivery=delivery))
    with DataPlane.open(config, **layout) as plane:
        for batch in plane:
            served.append([batch.positions.tolist(), batch.digests])
            loss = (1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.step)).astype(np.float32)
            for tokens in parts:
                plane.record(batch, loss[:, tokens], tokens=tokens)
            if batch.step + 1 == STEPS:
                break
        plane.state_dict()
        losses = [figures.loss_sum.tolist() for figures in plane.completed_statistics()]
    return {"served": served, "losses": losses}


def torch_layouts(config: Config) -> Iterator[tuple[str, int, dict[str, Any]]]:
    from torch.distributed.device_mesh import init_device_mesh

    for number, dims in enumerate(itertools.permutations(("dp", "pp", "cp"))):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=dims)
        # Only the last pipeline stage has losses; each of its context-parallel ranks has one half.
        parts = [HALVES[mesh.get_local_rank("cp")]] if mesh.get_local_rank("pp") == 1 else []
        answer = serve(config, ("each", "lead")[number % 2], parts, mesh=mesh, loss_parts=("cp",))
        yield "-".join(dims), mesh.get_local_rank("dp"), answer


def mpi_layouts(config: Config, rank: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for name, group, peer in (("neighbours", rank // 2, rank % 2), ("apart", rank % 2, rank // 2)):
        parts = list(HALVES) if peer == 1 else []
        answer = serve(config, "lead", parts, data_parallel=(group, 2))
        yield name, group, answer


def main() -> None:
    kind, *overrides = sys.argv[1:]
    config = compose(overrides)
    if kind == "torch":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        own = list(torch_layouts(config))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        rank = dist.get_rank()
        dist.destroy_process_group()
    else:
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.rank
        gathered = MPI.COMM_WORLD.allgather(list(mpi_layouts(config, rank)))
    if rank == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    main()
