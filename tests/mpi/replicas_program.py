"""Compute the gradients of one batch on all ranks of `mpiexec`; rank 0 prints the error and a message as JSON."""

import json

import torch

from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.errors import CommError
from mixtera_hpc.integrations.process_group import Replicas
from mixtera_hpc.training.distributed import GradientBuffer
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
    model = build()
    num_rows = 6 // comm.size
    gradients = GradientBuffer(model)
    rows = slice(comm.rank * num_rows, (comm.rank + 1) * num_rows)
    gradients.backward(model(TOKENS[rows]), mask(rows))
    gradients.average(replicas)

    # The same gradients, computed by one process over the whole batch.
    reference = build()
    counted = mask(slice(0, 6))
    (reference(TOKENS)[counted].sum() / counted.sum()).backward()
    error = (flat(model) - flat(reference)).abs().max().item()

    # Change a weight on rank 1 only.
    replicas.check_identical(model)
    message = ""
    with torch.no_grad():
        model.norm.weight[0] += comm.rank == 1
    try:
        replicas.check_identical(model)
    except CommError as caught:
        message = str(caught)
    replicas.close()
    if comm.rank == 0:
        print(json.dumps({"error": error, "largest": flat(reference).abs().max().item(), "message": message}))
    comm.Free()


if __name__ == "__main__":
    main()
