"""Serve one run to 8 ranks in every layout of pipeline, tensor, context and data parallelism, and print what each got.

torchrun --nproc-per-node 8 megatron_layouts_program.py FOLDER OVERRIDES…
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.distributed.device_mesh import DeviceMesh

from mixtera_hpc import DataPlane, RunFolder, compose
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.integrations.megatron import BatchFormat, MegatronData

STEPS = 4


def loss_of(labels: Any, positions: Any, step: int) -> Any:
    """Return made-up losses, float32, that depend on the token, the sequence and the step."""
    return 1.0 + (torch.as_tensor(labels) % 97) / (3.0 + torch.as_tensor(positions)[:, None] + step)


def halves_in_mesh(config: Any, folder: RunFolder) -> dict[str, Any]:
    """Serve to two context-parallel ranks, which each record one half of every sequence. **Collective.**"""
    mesh = DeviceMesh("cpu", torch.arange(8).reshape(2, 2, 2), mesh_dim_names=("cp", "dp", "tp"))
    served = []
    with DataPlane.open(config, folder=folder, mesh=mesh, loss_parts=("cp",)) as plane:
        half = config.dataplane.seq_len // 2
        own = slice(0, half) if mesh.get_local_rank("cp") == 0 else slice(half, None)
        for batch in plane:
            served.append([batch.positions.tolist(), batch.digests])
            loss = loss_of(batch.tokens[:, 1:], batch.positions, batch.step)
            plane.record(batch, loss[:, own], tokens=own)
            if batch.step + 1 == STEPS:
                break
        return {"served": served, "statistics": plain(completed_of(plane)), "dp": mesh.get_local_rank("dp")}


def completed_of(plane: DataPlane) -> list[DomainStatistics]:
    """Return the statistics of every step. **Collective.**"""
    plane.state_dict()
    return plane.completed_statistics()


def plain(completed: list[DomainStatistics]) -> list[Any]:
    """Return statistics as numbers that JSON stores exactly."""
    return [[of_step.loss_sum.tolist(), of_step.num_tokens.tolist()] for of_step in completed]


def served_in_mesh(config: Any, dims: tuple[str, ...], folder: RunFolder) -> dict[str, Any]:
    """Serve in a mesh whose dimensions have the order `dims`; the last pipeline stage records. **Collective.**"""
    mesh = DeviceMesh("cpu", torch.arange(8).reshape(2, 2, 2), mesh_dim_names=dims)
    served = []
    with DataPlane.open(config, folder=folder, mesh=mesh) as plane:
        for batch in plane:
            served.append([batch.positions.tolist(), batch.digests])
            if mesh.get_local_rank("pp") == 1:
                plane.record(batch, loss_of(batch.tokens[:, 1:], batch.positions, batch.step))
            if batch.step + 1 == STEPS:
                break
        return {"served": served, "statistics": plain(completed_of(plane)), "dp": mesh.get_local_rank("dp")}


def draw(data_iterator: Any) -> dict[str, Any]:
    """Return the part of this rank of the micro-batch that its tensor-parallel group shares, as Megatron-LM does."""
    drawn = [next(data_iterator) if parallel_state.get_tensor_model_parallel_rank() == 0 else None]
    source = parallel_state.get_tensor_model_parallel_src_rank()
    dist.broadcast_object_list(drawn, source, parallel_state.get_tensor_model_parallel_group())
    batch: dict[str, Any] = drawn[0]
    step, positions = batch.pop("step"), batch.pop("positions")
    return {**get_batch_on_this_cp_rank(batch), "step": int(step), "positions": positions}


def train(data: MegatronData, iterators: list[Any], served: list[Any]) -> None:
    """Run one step as a pipeline with two chunks per stage does: only the first and the last one draw."""
    is_first = parallel_state.is_pipeline_first_stage()
    is_last = parallel_state.is_pipeline_last_stage()
    for _ in range(data.plane.local_batch_size // data.form.micro_batch_size):
        if is_first:
            batch = draw(iterators[0])
            served.append([batch["step"], batch["positions"].tolist(), batch["tokens"].tolist()])
        if is_last:
            batch = draw(iterators[-1])
            data.record(iterators[-1], loss_of(batch["labels"], batch["positions"], batch["step"]))


def served_by_megatron(config: Any, folder: RunFolder, **sizes: int) -> dict[str, Any]:
    """Serve through `MegatronData` in Megatron's own groups. **Collective.**"""
    parallel_state.initialize_model_parallel(**sizes)
    served: list[Any] = []
    held_out = []
    train_losses: dict[str, float] = {}

    def log(metrics: dict[str, float], step: int) -> None:
        train_losses.update({name: value for name, value in metrics.items() if name.startswith("train_loss/")})

    # Logged once, at the end: the mean over all steps.
    with MegatronData.open(config, BatchFormat(micro_batch_size=2), folder, log, log_every=STEPS + 1) as data:
        iterators = [data.train_iterator(), data.train_iterator()]
        while data.begin_step():
            train(data, iterators, served)
            if data.plane.next_step % 2 == 0:
                held_out.append(validated(data))
            if data.plane.next_step == STEPS:
                break
        data.state_dict()
        result = {"served": served, "train_losses": train_losses, "held_out": held_out}
        result["dp"] = parallel_state.get_data_parallel_rank()
    parallel_state.destroy_model_parallel()
    return result


def validated(data: MegatronData) -> dict[str, float]:
    """Validate on two global batches. **Collective.**"""
    iterator = data.validation_iterator()
    for _ in range(2 * data.plane.local_batch_size // data.form.micro_batch_size):
        if parallel_state.is_pipeline_last_stage():
            batch = draw(iterator)
            data.record(iterator, loss_of(batch["labels"], batch["positions"], batch["step"]))
    return data.end_validation()


def results(config: Any, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for dims in itertools.permutations(["dp", "pp", "tp"]):
        name = "-".join(dims)
        yield name, served_in_mesh(config, dims, RunFolder(folder / name))
    yield "cp-dp-tp", halves_in_mesh(config, RunFolder(folder / "cp-dp-tp"))
    layouts = {
        "pp2-tp2": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        "cp2-tp2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
        "pp2-cp2": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
    }
    for name, sizes in layouts.items():
        yield name, served_by_megatron(config, RunFolder(folder / name), **sizes)


def main() -> None:
    dist.init_process_group("gloo")
    config = compose(sys.argv[2:])
    own = dict(results(config, Path(sys.argv[1])))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
