"""A training loop of your own with plain PyTorch: DistributedDataParallel and torch.distributed.checkpoint.

torchrun --nproc-per-node 2 examples/trainers/torchrun_ddp.py --out runs/ddp --overrides experiment=demo
"""

from contextlib import nullcontext

import torch
import torch.distributed.checkpoint as dcp
from command_line import TrainingRecord, parse_arguments
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mixtera_hpc import DataPlane, Replicas, RunFolder, compose
from mixtera_hpc.integrations.domain_metrics import domain_losses

arguments = parse_arguments()
# Creates the process group, under any launcher; a job of one process has none.
replicas = Replicas(device="cpu")
num_ranks = replicas.comm.size
torch.manual_seed(0)


def loss_of(tokens):  # (B, T + 1) → (B, T)
    return cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")


def validate():
    for batch in held_out.batches():
        with torch.no_grad():
            held_out.record(batch, loss_of(torch.from_numpy(batch.tokens)))
    return domain_losses([held_out.reduce(plane.next_step)], plane.domain_names, "held_out_loss")


def metrics_of(completed):
    weights = zip(plane.domain_names, plane.weights.tolist(), strict=True)
    losses = domain_losses(completed, plane.domain_names, "train_loss")
    return losses | {f"weight/{name}": weight for name, weight in weights}


with replicas, DataPlane.open(compose(arguments.overrides), folder=RunFolder(arguments.out)) as plane:
    record = TrainingRecord(arguments.out, replicas.comm.rank)
    held_out = plane.held_out() if plane.config.query.holdout.fraction > 0 else None
    model = torch.nn.Sequential(torch.nn.Embedding(plane.vocab_size, 32), torch.nn.Linear(32, plane.vocab_size))
    model = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if arguments.resume:
        content = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        newest = max(arguments.out.glob("checkpoint_*/.metadata")).parent
        dcp.load({**content, "data": plane}, checkpoint_id=newest)
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])

    for batch in plane:
        tokens, counted = torch.from_numpy(batch.tokens), torch.from_numpy(batch.loss_mask)
        num_counted = counted.sum()
        replicas.all_reduce(num_counted)
        for rows in torch.arange(len(tokens)).chunk(arguments.accumulate):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            no_sync = num_ranks > 1 and rows.stop < len(tokens)
            with model.no_sync() if no_sync else nullcontext():
                loss = loss_of(tokens[rows])
                # The loss is the mean over the counted tokens of all ranks. DDP averages over ranks: hence num_ranks.
                (torch.where(counted[rows], loss, 0.0).sum() * num_ranks / num_counted).backward()
            plane.record(batch, loss, rows=rows)
            record.add(batch.positions[rows], tokens[rows], loss, counted[rows])
        optimizer.step()
        optimizer.zero_grad()
        record.end_step(batch.step)

        num_done, stop = batch.step + 1, plane.stop_requested()
        if stop or plane.save_requested() or num_done == arguments.save_at:
            content = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save({**content, "data": plane}, checkpoint_id=arguments.out / f"checkpoint_{num_done:06d}")
        record.log(metrics_of(plane.completed_statistics()), batch.step)
        if held_out and num_done == arguments.steps:
            record.log(validate(), batch.step)
        if stop or num_done in (arguments.steps, arguments.stop_after):
            break
