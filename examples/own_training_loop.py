"""A training loop of your own on the data plane, with plain PyTorch and mpi4py.

mpiexec -n 2 python -m mpi4py examples/own_training_loop.py experiment=demo training.num_steps=20
"""

import sys

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

from mixtera_hpc import DataPlane, compose

comm = MPI.COMM_WORLD
config = compose(sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(0)


def print_losses(plane: DataPlane) -> None:
    """Print the mean loss of every step whose losses have been summed over all ranks since the last call."""
    for statistics in plane.completed_statistics():
        if comm.rank == 0:
            loss = statistics.loss_sum.sum() / statistics.num_tokens.sum()
            print(f"step {statistics.step}: loss {loss:.3f}", flush=True)


with DataPlane.open(config, comm=comm) as plane:
    model = torch.nn.Sequential(torch.nn.Embedding(plane.vocab_size, 64), torch.nn.Linear(64, plane.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for batch in plane:
        # tokens: (B, T + 1). loss_mask: (B, T), True where the prediction of the next token counts.
        tokens = torch.from_numpy(batch.tokens)
        counted = torch.from_numpy(batch.loss_mask)
        logits = model(tokens[:, :-1])
        loss_per_token = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

        # The loss is the mean over the counted tokens of all ranks.
        optimizer.zero_grad()
        (loss_per_token * counted).sum().backward()
        num_counted = comm.allreduce(int(counted.sum()))
        for parameter in model.parameters():
            comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
            parameter.grad /= num_counted
        optimizer.step()

        # The data plane reduces the losses per domain in the background; dynamic mixtures learn from them.
        plane.record(batch, loss_per_token)
        print_losses(plane)

        if plane.stop_requested() or batch.step + 1 == config.training.num_steps:
            state = plane.state_dict()  # One small array, the same on every rank. Save it with the model.
            print_losses(plane)
            break
