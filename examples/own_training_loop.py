"""Your own training loop on the data plane.

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


def tell_losses() -> None:
    """Of the steps whose losses have been added up over all ranks since the last call."""
    for done in plane.completed_statistics():
        if comm.rank == 0:
            print(f"step {done.step}: loss {done.loss_sum.sum() / done.num_tokens.sum():.3f}", flush=True)


with DataPlane.open(config, comm=comm) as plane:
    model = torch.nn.Sequential(torch.nn.Embedding(plane.vocab_size, 64), torch.nn.Linear(64, plane.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in plane:
        tokens, counted = torch.from_numpy(batch.tokens), torch.from_numpy(batch.loss_mask)
        logits = model(tokens[:, :-1])
        loss_per_token = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        optimizer.zero_grad()
        (loss_per_token * counted).sum().backward()
        total = comm.allreduce(int(counted.sum()))
        for parameter in model.parameters():
            comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
            parameter.grad /= total
        optimizer.step()
        plane.record(batch, loss_per_token)
        tell_losses()
        if plane.stop_requested() or batch.step + 1 == config.training.num_steps:
            state = plane.state_dict()  # None but on rank 0: yours to save beside the model.
            tell_losses()
            break
