"""The process group of a training job that was started with any launcher, and the device of each rank."""

import os
import socket
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.errors import CommError, ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export the type.
else:
    from torch.distributed import TCPStore

__all__ = ["Replicas"]

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

MAX_RANKS_IN_MESSAGE = 8


class Replicas:
    """The identical copies of the model, one per rank, and the device of this rank.

    With several ranks, the constructor reuses the process group if there is one, for example under torchrun. Otherwise
    it creates one (NCCL on GPUs, gloo on CPUs), and `close` destroys it. Ranks then meet at a `TCPStore` on rank 0,
    which listens on a port chosen by the kernel, so several jobs can share a node. Its address is `MASTER_ADDR` if rank
    0 has that variable, else the host name of rank 0. A single rank needs no process group.
    """

    def __init__(self, comm: Communicator, device: str) -> None:
        """Choose the device, and create the process group unless there is one. **Collective.**

        Args:
            comm: the communicator of the training job.
            device: `training.device`: auto, cpu or cuda.

        Raises:
            ConfigError: `device` is cuda and at least one rank sees no GPU.
            CommError: the host name of rank 0 cannot be resolved, or the process group has other ranks.
        """
        self.comm = comm
        self.device = _select_device(comm, device)
        # The store serves the process group and must live as long as the group does.
        self._store: TCPStore | None = None
        if dist.is_available() and dist.is_initialized():
            _check_same_ranks(comm)
        elif comm.size > 1:
            self._store = _open_store(comm)
            self._create_process_group(self._store)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over all ranks, in place. **Collective.**"""
        if self.comm.size > 1:
            dist.all_reduce(tensor)

    def check_identical(self, model: nn.Module) -> None:
        """Check that every rank has the same weights. **Collective.**

        Raises:
            CommError: names the ranks whose weights differ from those of rank 0.
        """
        checksums = self.comm.Allgather(np.array([_weights_checksum(model)], np.int64))[:, 0]
        different = np.flatnonzero(checksums != checksums[0])
        if len(different):
            ranks = different.tolist()[:MAX_RANKS_IN_MESSAGE]
            raise CommError(f"The model's weights on ranks {ranks} differ from rank 0's.")

    def close(self) -> None:
        """Destroy the process group, if this object created it. **Collective.**"""
        if self._store is not None:
            self.comm.Barrier()
            dist.destroy_process_group()
            self._store = None

    def _create_process_group(self, store: TCPStore) -> None:
        is_on_gpu = self.device.type == "cuda"
        backend = "nccl" if is_on_gpu else "gloo"
        device = self.device if is_on_gpu else None
        dist.init_process_group(backend, store=store, rank=self.comm.rank, world_size=self.comm.size, device_id=device)


def _select_device(comm: Communicator, requested: str) -> torch.device:
    """Return this rank's GPU if every rank has one, else the CPU. **Collective.**"""
    num_devices = 0 if requested == "cpu" else torch.cuda.device_count()
    fewest = int(comm.Allreduce(np.array([num_devices], np.int64), "min")[0])
    if requested == "cuda" and fewest == 0:
        raise ConfigError(
            "training.device is cuda, but at least one rank sees no CUDA device.\n"
            "  Set training.device=auto or training.device=cpu, or request GPUs for the job."
        )
    if fewest == 0:
        return torch.device("cpu")

    device = torch.device("cuda", comm.local_rank % num_devices)
    torch.cuda.set_device(device)
    return device


def _check_same_ranks(comm: Communicator) -> None:
    """Raise CommError if the process group numbers its ranks in another way than `comm`."""
    if (dist.get_rank(), dist.get_world_size()) != (comm.rank, comm.size):
        raise CommError(
            f"Rank {comm.rank} of {comm.size} is rank {dist.get_rank()} of {dist.get_world_size()} in torch's process "
            "group.\n  Set dataplane.comm=auto, which takes the ranks of the process group."
        )


def _open_store(comm: Communicator) -> TCPStore:
    """Open the key-value store at which the ranks meet: rank 0 listens, the others connect. **Collective.**"""
    if comm.rank == 0:
        address = _own_address(comm)
        # Port 0 lets the kernel choose a free port.
        store = _tcp_store(comm, address, port=0)
        _broadcast_endpoint(comm, address, store.port)
    else:
        address, port = _broadcast_endpoint(comm)
        store = _tcp_store(comm, address, port)
    return store


def _tcp_store(comm: Communicator, address: str, port: int) -> TCPStore:
    return TCPStore(
        address,
        port,
        comm.size,
        is_master=comm.rank == 0,
        timeout=RENDEZVOUS_TIMEOUT,
        wait_for_workers=False,
    )


def _own_address(comm: Communicator) -> str:
    """Return the address at which the other ranks reach this one."""
    if comm.size == comm.local_size:
        return "127.0.0.1"
    name = os.environ.get("MASTER_ADDR", comm.hostname)
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise CommError(
            f"The host name {name!r} of rank 0 cannot be resolved ({error}).\n"
            "  Set MASTER_ADDR to an address of that node that the other nodes can reach."
        ) from None

    # Some hosts resolve their own name to a loopback address, which means something else on the other nodes.
    is_loopback = address.startswith("127.")
    return name if is_loopback else address


def _broadcast_endpoint(comm: Communicator, address: str = "", port: int = 0) -> tuple[str, int]:
    """Return the address and port that rank 0 passes. **Collective.**"""
    message = f"{address} {port}".encode() if comm.rank == 0 else None
    address, _, number = bcast_bytes(comm, message).decode().partition(" ")
    return address, int(number)


def _weights_checksum(model: nn.Module) -> int:
    """Return a CRC-32 over all weights."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), checksum)
    return checksum
