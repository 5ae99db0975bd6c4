"""`Mpi` and `TorchDistributed` pass the conformance suite of communicators, with every number of ranks up to 8."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.testing.communicators import CHECKS

PROGRAM = Path(__file__).with_name("communicator_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OWN_SHARED_MEMORY = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'


def passed(output: str) -> list[tuple[int, str]]:
    """Return (ranks, check) of every check that passed on a single node."""
    words = [line.split() for line in output.splitlines()]
    return [(int(number), check) for number, check, *_ in words if check != "nodes"]


def all_checks(ranks: int) -> list[tuple[int, str]]:
    return [(size, check.__name__) for size in range(1, ranks + 1) for check in CHECKS]


@pytest.mark.parametrize("ranks", [1, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (2, 3, 4)), 8])
def test_mpi_conforms_to_the_protocol(ranks: int) -> None:
    """A launch also checks groups of its first 1, 2, … ranks."""
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", PROGRAM, "mpi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert passed(done.stdout) == all_checks(ranks)


def test_torch_conforms_to_the_protocol_with_1_to_8_ranks() -> None:
    command = [sys.executable, PROGRAM.with_name("forked_ranks.py"), "8", PROGRAM, "torch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert passed(done.stdout) == all_checks(8)


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "sh", "-c", OWN_SHARED_MEMORY, "sh", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_unshare(), reason="needs the right to mount a second /dev/shm")
def test_torch_conforms_to_the_protocol_on_two_nodes(free_port: int) -> None:
    """Two torchrun agents with two ranks each; each agent has a /dev/shm of its own, as two nodes have."""
    agents = []
    for node in range(2):
        options = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        launch = [*TORCHRUN, *options, f"--master-port={free_port}", str(PROGRAM), "torch"]
        command = ["unshare", "--mount", "sh", "-c", OWN_SHARED_MEMORY, "sh", *launch]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [agent.communicate(timeout=900) for agent in agents]

    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert passed(outputs[0][0]) == all_checks(4)
    assert "4 nodes 2" in outputs[0][0]


@pytest.mark.skipif(not _can_unshare(), reason="needs the right to mount a second /dev/shm")
def test_too_little_shared_memory_is_refused_on_every_rank() -> None:
    """A container often has 64 MB. Writing beyond them would kill the process without a word."""
    small = OWN_SHARED_MEMORY.replace("-t tmpfs", "-t tmpfs -o size=64k")
    launch = [*TORCHRUN, "--nproc-per-node=2", str(PROGRAM), "torch", "--world"]
    command = ["unshare", "--mount", "sh", "-c", small, "sh", *launch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)

    assert done.returncode != 0
    assert done.stderr.count("CommError: The node of rank 0 has no 2400008 bytes of shared memory") == 2
    assert "--shm-size" in done.stderr
