"""Train a small Llama on a data plane in a training loop with accelerate.

python accelerate_loop.py --overrides experiment=demo --out runs/accelerate
torchrun --nproc-per-node 2 accelerate_loop.py …, or mpiexec -n 2 python accelerate_loop.py …
"""

import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from command_line import TrainingRecord, parse_arguments
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from mixtera_hpc import DataPlane, PlaneDataset, Replicas, RunFolder, compose
from mixtera_hpc.integrations.domain_metrics import domain_losses

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def token_losses(model, tokens):
    logits = model(input_ids=tokens[:, :-1]).logits
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def metrics_of(plane, held_out, model):
    """Return the losses and weights of every domain: of the last steps, and on held-out data."""
    weights = zip(plane.domain_names, plane.weights.tolist(), strict=True)
    metrics = {f"weight/{name}": weight for name, weight in weights}
    metrics |= domain_losses(plane.completed_statistics(), plane.domain_names, "train_loss")
    if held_out is not None:
        for batch in held_out.batches():
            with torch.no_grad():
                held_out.record(batch, token_losses(model, torch.from_numpy(batch.tokens).to(model.device)))
        metrics |= domain_losses([held_out.reduce(plane.next_step)], plane.domain_names, "held_out_loss")
    return metrics


arguments = parse_arguments()
config = compose(arguments.overrides)
with Replicas() as replicas, DataPlane.open(config, folder=RunFolder(arguments.out)) as plane:
    accelerator = Accelerator(cpu=replicas.device.type == "cpu", gradient_accumulation_steps=arguments.accumulate)
    set_seed(config.dataplane.seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=plane.vocab_size, **SIZES))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.register_for_checkpointing(plane)
    if arguments.resume:
        accelerator.load_state(str(arguments.out / "checkpoint"))
    held_out = plane.held_out() if config.query.holdout.fraction > 0 else None
    record = TrainingRecord(arguments.out, accelerator.process_index)
    micro_batch_size = plane.local_batch_size // arguments.accumulate

    # The loader is not prepared: the data plane has already given every rank its own part.
    for batch in DataLoader(PlaneDataset(plane, num_steps=arguments.steps), batch_size=None):
        # The loss is the mean over the counted tokens of all ranks and micro-batches.
        num_counted = accelerator.reduce(batch["loss_mask"].sum().to(accelerator.device), "sum")
        for first in range(0, plane.local_batch_size, micro_batch_size):
            rows = slice(first, first + micro_batch_size)
            tokens, counted = (batch[name][rows].to(accelerator.device) for name in ("tokens", "loss_mask"))
            with accelerator.accumulate(model):
                losses = token_losses(model, tokens)
                plane.record(batch, losses.detach(), rows=rows)
                record.add(batch["positions"][rows], tokens, losses, counted)
                # accelerate divides by the number of micro-batches, and averages over the ranks.
                scale = arguments.accumulate * accelerator.num_processes / num_counted
                accelerator.backward(torch.where(counted, losses, 0.0).sum() * scale)
                optimizer.step()
                optimizer.zero_grad()

        record.end_step(int(batch["step"]))
        stop = plane.stop_requested()
        if stop or plane.next_step in (arguments.save_at, arguments.steps):
            accelerator.save_state(str(arguments.out / "checkpoint"))
            metrics = metrics_of(plane, held_out, accelerator.unwrap_model(model))
            with (arguments.out / f"metrics_{accelerator.process_index}.jsonl").open("a") as file:
                file.write(json.dumps({"step": plane.next_step, **metrics}) + "\n")
        if stop or plane.next_step == arguments.stop_after:
            break
