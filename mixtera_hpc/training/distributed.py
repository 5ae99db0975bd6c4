"""torch.distributed started from a Communicator, for the one thing the trainer needs of it: summing gradients.

Plain all-reduce of one flat buffer instead of DDP: the right divisor, the number of counted tokens of the global batch, is only
known when every micro-batch of every rank is done, and it travels at the end of the same buffer; DDP divides by the number of
ranks and would need the count in advance. Price: the sum starts after the backward pass instead of during it. At a model
that fits one GPU and a trainer that exists to exercise a data plane, that is the simpler side of the bargain.
"""

import os
import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.errors import CommError, ConfigError

__all__ = ["GradientBuffer", "Replicas"]

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)


class Replicas:
    """The copies of the model, one per rank, and the device each computes on.

    With one rank no process group is made. The rendezvous is a store on rank 0, on a port the kernel picks, so any number of
    jobs share a node; rank 0's address is what MASTER_ADDR says there, or what its host name resolves to.
    """

    def __init__(self, comm: Communicator, device: str) -> None:
        """Start the process group. **Collective.**

        Raises:
            ConfigError: `device` is cuda and a rank sees no GPU.
            CommError: rank 0's host name cannot be resolved.
        """
        self.comm = comm
        self.device = _device(comm, device)
        self._store: dist.TCPStore | None = None
        if comm.size > 1:
            self._start()

    def sum_(self, tensor: Tensor) -> None:
        """Add up `tensor` over all ranks, in place. **Collective.**"""
        if self.comm.size > 1:
            dist.all_reduce(tensor)

    def check_identical(self, model: nn.Module) -> None:
        """Make sure that no replica has drifted from the others. **Collective.**

        Raises:
            CommError: names the ranks whose weights differ from rank 0's.
        """
        digests = self.comm.Allgather(np.array([_digest(model)], np.int64))[:, 0]
        different = np.flatnonzero(digests != digests[0])
        if len(different):
            raise CommError(f"The model's weights on ranks {different.tolist()[:8]} differ from rank 0's.")

    def close(self) -> None:
        """End the process group. **Collective.**"""
        if self._store is not None:
            self.comm.Barrier()
            dist.destroy_process_group()
            self._store = None

    def _start(self) -> None:
        comm, backend = self.comm, "nccl" if self.device.type == "cuda" else "gloo"
        address, port = "", 0
        if comm.rank == 0:
            address = _own_address(comm)
            self._store = _open_store(address, 0, comm)
            port = self._store.port
        address, port = _broadcast_endpoint(comm, address, port)
        if comm.rank != 0:
            self._store = _open_store(address, port, comm)
        on_gpu = self.device if self.device.type == "cuda" else None
        dist.init_process_group(backend, store=self._store, rank=comm.rank, world_size=comm.size, device_id=on_gpu)


class GradientBuffer:
    """All gradients of a model in one flat buffer, and behind them the number of tokens they are the sum over.

    Parameters' `.grad` are views of the buffer, so nothing is copied before or after the all-reduce.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        total = sum(p.numel() for p in parameters)
        self._buffer = torch.zeros(total + 1, dtype=torch.float32, device=parameters[0].device)
        self._sums, self._num_tokens = self._buffer[:total], self._buffer[total:]
        start = 0
        for parameter in parameters:
            parameter.grad = self._sums[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero(self) -> None:
        """Begin a step."""
        self._buffer.zero_()

    def add(self, loss: Tensor, counted: Tensor) -> None:
        """Add the gradients of the summed losses of the tokens that count; `loss` and bool `counted` are (B, T)."""
        loss.masked_fill(~counted, 0.0).sum().backward()
        self._num_tokens += counted.sum()

    def average(self, replicas: Replicas) -> None:
        """Turn this rank's sums into the mean over the global batch's counted tokens. **Collective.**"""
        replicas.sum_(self._buffer)
        self._sums /= self._num_tokens.clamp(min=1)

    def clip(self, max_norm: float) -> None:
        """Scale down to a Euclidean norm of at most `max_norm`; never waits for the device."""
        self._sums *= (max_norm / (self._sums.norm() + 1e-6)).clamp(max=1)


def _device(comm: Communicator, wanted: str) -> torch.device:
    num_devices = torch.cuda.device_count() if wanted != "cpu" else 0
    fewest = int(comm.Allreduce(np.array([num_devices], np.int64), "min")[0])
    if wanted == "cuda" and fewest == 0:
        raise ConfigError(
            "training.device is cuda, but at least one rank sees no CUDA device. Set training.device=auto or cpu, or ask for GPUs."
        )
    if fewest == 0:
        return torch.device("cpu")
    device = torch.device("cuda", comm.local_rank % num_devices)
    torch.cuda.set_device(device)
    return device


def _open_store(address: str, port: int, comm: Communicator) -> dist.TCPStore:
    """Rank 0 listens on `port` (0: any free one), the others connect."""
    return dist.TCPStore(
        address, port, comm.size, is_master=comm.rank == 0, timeout=RENDEZVOUS_TIMEOUT, wait_for_workers=False
    )


def _own_address(comm: Communicator) -> str:
    """Where the other ranks find this one."""
    if comm.size == comm.local_size:
        return "127.0.0.1"
    name = os.environ.get("MASTER_ADDR", comm.hostname)
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise CommError(
            f"The host name {name!r} of rank 0 cannot be resolved ({error}). Set MASTER_ADDR to an address of that node "
            "which the others reach."
        ) from None
    return name if address.startswith("127.") else address


def _broadcast_endpoint(comm: Communicator, address: str, port: int) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. **Collective.**"""
    own = f"{address} {port}".encode() if comm.rank == 0 else None
    address, _, number = bcast_bytes(comm, own).decode().partition(" ")
    return address, int(number)


def _digest(model: nn.Module) -> int:
    """A checksum of all weights that fits an int64."""
    import zlib

    value = 0
    for parameter in model.parameters():
        value = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), value)
    return value
