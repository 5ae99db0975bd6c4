"""Run by `mpiexec`: each rank holds a part of one batch; rank 0 prints what came out as JSON."""

import json

import torch

from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.errors import CommError
from mixtera_hpc.training.distributed import GradientBuffer, Replicas
from mixtera_hpc.training.model import GPT, build_model

COUNTED = torch.tensor([12, 1, 5, 0, 7, 3])
TOKENS = torch.randint(50, (6, 13), generator=torch.Generator().manual_seed(3))


def build() -> GPT:
    return build_model(TrainingConfig(num_layers=1, num_heads=2, embedding_dim=16), vocab_size=50, seq_len=12)


def mask(rows: slice) -> torch.Tensor:
    return torch.arange(12) < COUNTED[rows, None]


def flat(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    comm = Mpi.world()
    replicas = Replicas(comm, "cpu")
    model, share = build(), 6 // comm.size
    gradients = GradientBuffer(model)
    mine = slice(comm.rank * share, (comm.rank + 1) * share)
    gradients.backward(model(TOKENS[mine]), mask(mine))
    gradients.average(replicas)
    alone, everything = build(), mask(slice(0, 6))
    (alone(TOKENS)[everything].sum() / everything.sum()).backward()
    error = (flat(model) - flat(alone)).abs().max().item()

    replicas.check_identical(model)
    complaint = ""
    with torch.no_grad():
        model.norm.weight[0] += comm.rank == 1
    try:
        replicas.check_identical(model)
    except CommError as caught:
        complaint = str(caught)
    replicas.close()
    if comm.rank == 0:
        print(json.dumps({"error": error, "largest": flat(alone).abs().max().item(), "complaint": complaint}))
    comm.Free()


if __name__ == "__main__":
    main()
