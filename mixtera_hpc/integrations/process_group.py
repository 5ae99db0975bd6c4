"""`Replicas`: the process group of a training job that was started with any launcher, and the device of each rank."""

import os
import socket
import zlib
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.comm.launcher import end_job, open_communicator
from mixtera_hpc.errors import CommError, ConfigError, is_clean_exit

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export the type.
else:
    from torch.distributed import TCPStore

__all__ = ["Replicas"]

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

MAX_RANKS_IN_MESSAGE = 8


class Replicas:
    """The identical copies of the model, one per rank, and the device of this rank.

    Trainers that know only torchrun also run under mpiexec and srun with it. Open it before the trainer:

        with Replicas() as replicas, DataPlane.open(config) as plane:
            train(plane, replicas.device)

    With several ranks, the process group is reused if there is one, for example under torchrun. Otherwise one is
    created (NCCL on GPUs, gloo on CPUs), and `close` destroys it. Ranks then meet at a `TCPStore` on rank 0, which
    listens on a port chosen by the kernel, so several jobs can share a node. Its address is `MASTER_ADDR` if rank 0 has
    that variable, else the host name of rank 0. A single rank needs no process group.

    With several ranks, the variables that torchrun would set are set where they are missing, until `close`: `RANK`,
    `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `GROUP_RANK` (number of the node), and for a process group that is
    created here `MASTER_ADDR` and `MASTER_PORT`. Accelerate and Lightning read them.

    After an exception in the `with` block of one rank, that rank is named and all ranks end. Only a caller who gives a
    communicator does that itself (`run_guarded`).
    """

    def __init__(self, comm: Communicator | None = None, device: str = "auto") -> None:
        """Choose the device, and create the process group unless there is one. **Collective.**

        Args:
            comm: the communicator of all ranks; None to detect how this process was started.
            device: cpu, cuda, or auto, which takes the GPU if every rank has one.

        Raises:
            ConfigError: `device` is cuda and at least one rank sees no GPU.
            CommError: the host name of rank 0 cannot be resolved, the process group has other ranks, or `RANK` or
                `WORLD_SIZE` is that of another job.
            LaunchError: the ranks of the job do not see each other.
        """
        self._owns_comm = comm is None
        self.comm: Communicator = open_communicator(creates_group=True) if comm is None else comm
        # The store serves the process group and must live as long as the group does.
        self._store: TCPStore | None = None
        self._variables: list[str] = []
        """The environment variables that this object has set."""
        try:
            self._join(device)
        except BaseException as error:
            if self._owns_comm:
                end_job(self.comm, error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or is_clean_exit(error):
            self.close()
        elif self._owns_comm:
            end_job(self.comm, error)

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
        for name in self._variables:
            os.environ.pop(name, None)
        self._variables.clear()
        if self._owns_comm:
            self.comm.Free()

    def _join(self, device: str) -> None:
        """Choose the device, and join the process group. **Collective.**"""
        self.device = _select_device(self.comm, device)
        if self.comm.size == 1:
            return
        variables = _variables_of_rank(self.comm)
        if dist.is_available() and dist.is_initialized():
            _check_same_ranks(self.comm)
        else:
            self._store = _open_store(self.comm)
            self._create_process_group(self._store)
            variables |= {"MASTER_ADDR": self._store.host, "MASTER_PORT": str(self._store.port)}
        self._set_missing(variables)

    def _set_missing(self, variables: dict[str, str]) -> None:
        """Set the environment variables that are not set."""
        for name in ("RANK", "WORLD_SIZE"):
            value = os.environ.get(name, variables[name])
            if value != variables[name]:
                raise CommError(
                    f"The environment variable {name} is {value}, but this process is rank {self.comm.rank} of "
                    f"{self.comm.size}. A trainer would believe the variable.\n  Unset RANK and WORLD_SIZE: they are "
                    "those of another launcher."
                )
        missing = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(missing)
        self._variables += missing

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


def _variables_of_rank(comm: Communicator) -> dict[str, str]:
    """Return what torchrun would set for this rank of a process group. **Collective.**"""
    own_node = zlib.crc32(comm.hostname.encode())
    nodes = list(dict.fromkeys(comm.Allgather(np.array([own_node], np.int64))[:, 0].tolist()))
    numbers = {
        "RANK": comm.rank,
        "WORLD_SIZE": comm.size,
        "LOCAL_RANK": comm.local_rank,
        "LOCAL_WORLD_SIZE": comm.local_size,
        "GROUP_RANK": nodes.index(own_node),
    }
    return {name: str(number) for name, number in numbers.items()}


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
