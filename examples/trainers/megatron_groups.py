"""A loop on megatron-core's groups of ranks with `MegatronData`: every rank holds the whole tiny model.

TENSOR_PARALLEL=2 torchrun --nproc-per-node 4 examples/trainers/megatron_groups.py --out runs/groups --steps 8
"""

import os

import torch
import torch.distributed as dist
from command_line import TrainingRecord, parse_arguments
from megatron.core import parallel_state as groups

from mixtera_hpc import Replicas, RunFolder, compose
from mixtera_hpc.integrations.megatron import BatchFormat, MegatronData

arguments = parse_arguments()
config = compose(arguments.overrides)
replicas = Replicas(device="cpu")  # Creates the process group, under any launcher.
if not dist.is_initialized():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
groups.initialize_model_parallel(tensor_model_parallel_size=int(os.environ.get("TENSOR_PARALLEL", "1")))
data_parallel, tensor_parallel = groups.get_data_parallel_group(), groups.get_tensor_model_parallel_group()
form = BatchFormat(micro_batch_size=config.dataplane.global_batch_size // data_parallel.size() // arguments.accumulate)
loss_of = torch.nn.CrossEntropyLoss(reduction="none")
torch.manual_seed(0)


def get_batch(data_iterator):  # As in Megatron-LM: the first rank of a tensor-parallel group draws a micro-batch.
    drawn = [next(data_iterator) if groups.get_tensor_model_parallel_rank() == 0 else None]
    dist.broadcast_object_list(drawn, groups.get_tensor_model_parallel_src_rank(), tensor_parallel)
    return drawn[0]


def forward_step(data_iterator):
    batch = get_batch(data_iterator)
    loss = loss_of(model(batch["tokens"]).transpose(1, 2), batch["labels"])
    data.record(data_iterator, loss)
    return batch, loss


def train_step(data_iterator):
    num_counted = torch.zeros(1)
    for _ in range(arguments.accumulate):
        batch, loss = forward_step(data_iterator)
        (loss * batch["loss_mask"]).sum().backward()
        num_counted += batch["loss_mask"].sum()
        tokens = torch.cat([batch["tokens"], batch["labels"][:, -1:]], 1)
        record.add(batch["positions"], tokens, loss, batch["loss_mask"] > 0)
    dist.all_reduce(num_counted, group=data_parallel)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=data_parallel)
        parameter.grad /= num_counted
    optimizer.step()
    optimizer.zero_grad()


record = TrainingRecord(arguments.out, dist.get_rank())
with replicas, MegatronData.open(config, form, RunFolder(arguments.out), record.log) as data:
    size = data.plane.vocab_size
    model = torch.nn.Sequential(torch.nn.Embedding(size, 32), torch.nn.Linear(32, size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = {"model": model, "optimizer": optimizer, "data": data}
    if arguments.resume:
        for name, state in torch.load(max(arguments.out.glob("iter_*.pt"))).items():
            parts[name].load_state_dict(state)
    train_iterator, validation_iterator = data.train_iterator(), data.validation_iterator()
    while data.begin_step():
        train_step(train_iterator)
        record.end_step(data.plane.next_step - 1)
        num_done, stop = data.plane.next_step, data.stop_requested()
        if stop or data.save_requested() or num_done == arguments.save_at:
            saved = {name: part.state_dict() for name, part in parts.items()}
            if dist.get_rank() == 0:
                torch.save(saved, arguments.out / f"iter_{num_done:07d}.pt")
        if num_done == arguments.steps and validation_iterator is not None:
            for _ in range(arguments.accumulate * config.training.validate_steps):
                forward_step(validation_iterator)
            data.end_validation()
        if stop or num_done in (arguments.steps, arguments.stop_after):
            break
