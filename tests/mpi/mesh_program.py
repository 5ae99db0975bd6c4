"""Serve some steps in every order of a mesh of 8 gloo ranks, and write what each rank was given.

python forked_ranks.py 8 mesh_program.py OUT OVERRIDES…, or under torchrun

Only the last pipeline stage records losses. `OUT/DIMS` is the folder of a run, and `OUT/DIMS.json` has one entry per
rank.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mixtera_hpc import DataPlane, RunFolder, compose
from mixtera_hpc.config.schema import Config

STEPS = 5
MODEL_PARALLEL = list(itertools.permutations(["dp", "pp", "tp"]))


def loss_of(batch: Any) -> Any:
    """Return a loss of every predicted token, shape (B, T), that depends on the tokens, the domain and the step."""
    return 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None] + batch.step)


def serve(plane: DataPlane, records: bool) -> dict[str, Any]:
    """Return what a rank was given in each step, and the statistics of all ranks."""
    served = []
    statistics = []
    for batch in plane:
        served.append([batch.positions.tolist(), batch.digests])
        if records:
            plane.record(batch, loss_of(batch))
        if batch.step + 1 == STEPS:
            break
    plane.state_dict()  # Waits for the statistics of the last step.
    for of_step in plane.completed_statistics():
        statistics.append([of_step.loss_sum.tolist(), of_step.num_tokens.tolist()])
    return {"served": served, "statistics": statistics}


def serve_layout(out: Path, config: Config, dims: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=dims)
    position = dict(zip(dims, map(int, np.unravel_index(dist.get_rank(), (2, 2, 2))), strict=True))
    folder = RunFolder(out / "-".join(dims))
    with DataPlane.open(config, folder=folder, mesh=mesh) as plane:
        own = serve(plane, records=position["pp"] == 1)

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {**own, "dp": position["dp"]})
    if dist.get_rank() == 0:
        folder.path.with_suffix(".json").write_text(json.dumps(ranks))


def main() -> None:
    out = Path(sys.argv[1])
    config = compose(sys.argv[2:])
    dist.init_process_group("gloo")
    for dims in MODEL_PARALLEL:
        serve_layout(out, config, dims)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
