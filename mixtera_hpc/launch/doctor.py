"""What works on this machine. Every check runs in a process of its own, all at once; the slowest (torch) decides how long."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixtera_hpc.launch.manifest import PACKAGES, installed_version

__all__ = ["Finding", "examine_machine"]

CHECK_LIMIT_S = 120
Verdict = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    what: str
    verdict: Verdict
    """`absent` is no fault: a laptop has no Slurm."""
    detail: str
    do: str | None = None
    """How to cure it."""


def examine_machine(runs_root: Path) -> list[Finding]:
    """Run every check."""
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _mpi_library,
        _mpi_ranks,
        _fabric,
        lambda: _file_system(runs_root),
        _hdf5,
        _slurm,
        _accounting,
        _gpus,
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for findings in pool.map(lambda check: check(), checks) for finding in findings]


def _python() -> list[Finding]:
    versions = [f"{name} {version}" for name in PACKAGES if (version := installed_version(name))]
    missing = [name for name in PACKAGES if not installed_version(name) and name != "mpich"]
    do = f"pip install {' '.join(missing)}" if missing else None
    return [
        Finding(
            what="python",
            verdict="ok",
            detail=f"{platform.python_version()} {platform.machine()} {sys.executable}",
        ),
        Finding(what="packages", verdict="wrong" if missing else "ok", detail=", ".join(versions), do=do),
    ]


def _mpi_library() -> list[Finding]:
    done = _run([sys.executable, "-m", "mixtera_hpc.comm.probe"], alone=True)
    if done.returncode:
        do = "Install an MPI: pip install mpich on a laptop; on a cluster load its module, or set MPI4PY_LIBMPI."
        return [Finding(what="mpi", verdict="wrong", detail=_last_line(done), do=do)]
    return [Finding(what="mpi", verdict="ok", detail=json.loads(done.stdout)["library"])]


def _mpi_ranks() -> list[Finding]:
    """Two ranks must see each other: with another MPI's mpiexec each believes to be alone."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        return [Finding(what="mpiexec", verdict="absent", detail="not found; srun starts ranks on a cluster")]
    done = _run([mpiexec, "-n", "2", sys.executable, "-m", "mixtera_hpc.comm.probe"], alone=True)
    if done.returncode:
        do = f"Use the mpiexec that belongs to this MPI; {mpiexec} does not."
        return [Finding(what="mpiexec", verdict="wrong", detail=_last_line(done), do=do)]
    facts = json.loads(done.stdout.splitlines()[-1])
    speed = f"broadcast {facts['broadcast_bytes_per_s'] / 1e9:.2f} GB/s between 2 ranks of this node"
    return [Finding(what="mpiexec", verdict="ok", detail=f"{mpiexec}: {facts['size']} ranks, {speed}")]


def _fabric() -> list[Finding]:
    cards = sorted(p.name for p in Path("/sys/class/cxi").glob("*")) if Path("/sys/class/cxi").is_dir() else []
    if shutil.which("fi_info") is None:
        return [
            Finding(what="fabric", verdict="ok" if cards else "absent", detail=", ".join(cards) or "no fi_info, no CXI")
        ]
    done = _run(["fi_info", "-l"])
    providers = [line.rstrip(":") for line in done.stdout.splitlines() if line.endswith(":")]
    if cards and "cxi" not in providers:
        do = "Slingshot is here but libfabric has no cxi provider: broadcasts would run over TCP, 10 to 100 times slower."
        return [Finding(what="fabric", verdict="wrong", detail=", ".join(providers), do=do)]
    return [Finding(what="fabric", verdict="ok", detail=f"libfabric providers: {', '.join(providers)}")]


def _file_system(root: Path) -> list[Finding]:
    """Where runs will lie: can we write, and lock as HDF5 does?"""
    import fcntl

    folder = root if root.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free / 1e9
    detail = f"{folder.resolve()}: {free:,.0f} GB free"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        do = "Set HDF5_USE_FILE_LOCKING=FALSE (the configs of known clusters do), or choose another MIXTERA_RUNS."
        return [Finding(what="runs", verdict="wrong", detail=f"{detail}; {error}", do=do)]
    locking = os.environ.get("HDF5_USE_FILE_LOCKING", "unset")
    return [Finding(what="runs", verdict="ok", detail=f"{detail}, locks work, HDF5_USE_FILE_LOCKING {locking}")]


def _hdf5() -> list[Finding]:
    done = _run([sys.executable, "-c", "import h5py; print(h5py.version.hdf5_version)"])
    if done.returncode:
        return [Finding(what="hdf5", verdict="wrong", detail=_last_line(done), do="pip install h5py")]
    return [Finding(what="hdf5", verdict="ok", detail=f"HDF5 {done.stdout.strip()}, opened without locks")]


def _slurm() -> list[Finding]:
    if shutil.which("sinfo") is None:
        return [Finding(what="slurm", verdict="absent", detail="no sinfo: submit from a login node, or make slurm-up")]
    done = _run(["sinfo", "--noheader", "--format=%P %D nodes %l"])
    if done.returncode:
        return [Finding(what="slurm", verdict="wrong", detail=_last_line(done), do="Is the controller up?")]
    version = _run(["sinfo", "--version"]).stdout.strip()
    partitions = ", ".join(line.strip() for line in done.stdout.splitlines())
    kinds = _run(["srun", "--mpi=list"])
    offered = " ".join((kinds.stdout + kinds.stderr).replace("MPI plugin types are...", "").split())
    return [
        Finding(what="slurm", verdict="ok", detail=f"{version}: {partitions}"),
        Finding(what="srun --mpi", verdict="ok", detail=offered),
    ]


def _accounting() -> list[Finding]:
    if shutil.which("sacct") is None:
        return []
    done = _run(["sacct", "--noheader", "--allocations", "--starttime=now"])
    if done.returncode:
        detail = f"{_last_line(done)}; ends are read from the batch script's own record"
        return [Finding(what="sacct", verdict="absent", detail=detail)]
    return [Finding(what="sacct", verdict="ok", detail="accounting answers")]


def _gpus() -> list[Finding]:
    code = "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])"
    done = _run([sys.executable, "-c", code])
    if done.returncode:
        return [Finding(what="gpus", verdict="wrong", detail=_last_line(done), do="pip install torch")]
    names = done.stdout.strip()
    if names == "[]":
        return [Finding(what="gpus", verdict="absent", detail="torch sees none")]
    return [Finding(what="gpus", verdict="ok", detail=names)]


def _run(command: Sequence[str], *, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """With `alone`, without the launcher's variables: a probe must not believe that it is a rank of the doctor's job."""
    launchers = ("PMI", "OMPI_", "PRTE_", "SLURM_", "HYDI_", "HYDRA_") if alone else ()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launchers)} if launchers else None
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_LIMIT_S, env=environment, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"
