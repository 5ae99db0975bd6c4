"""Check what works on this machine: Python packages, MPI, the network, file locks, HDF5, Slurm, GPUs.

A check runs in a separate process if a library may abort Python. All checks run at once, so the slowest one
(importing torch) decides how long the verb takes.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixtera_hpc.errors import EXTRAS
from mixtera_hpc.launch.manifest import PACKAGES, installed_version

__all__ = ["Finding", "examine_machine", "package_findings"]

CHECK_LIMIT_S = 120
LAUNCHER_VARIABLES = ("PMI", "OMPI_", "PRTE_", "SLURM_", "HYDI_", "HYDRA_")
"""Prefixes of the environment variables that tell a process that it is a rank of an MPI job."""

LAPTOP_PACKAGES = ("mpich",)
"""Packages that a cluster replaces by its own library; they are never reported as missing."""

Verdict = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's table; the field names are those of `--json`."""

    check: str
    verdict: Verdict
    """`absent` is not a fault: a laptop has no Slurm."""
    detail: str
    fix: str | None = None
    """Action that solves the problem."""


def examine_machine(runs_root: Path) -> list[Finding]:
    """Run every check.

    Args:
        runs_root: Folder of all runs, whose file system is checked.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _check_python,
        _check_mpi_library,
        _check_mpiexec,
        _check_fabric,
        lambda: _check_file_system(runs_root),
        _check_hdf5,
        _check_slurm,
        _check_accounting,
        _check_gpus,
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for findings in pool.map(lambda check: check(), checks) for finding in findings]


def package_findings(versions: Mapping[str, str | None]) -> list[Finding]:
    """Judge installed packages: a missing required package is wrong, a missing optional one is absent.

    Args:
        versions: Package name → installed version, or None.
    """
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [name for name, version in versions.items() if not version]
    required = [name for name in missing if name not in EXTRAS and name not in LAPTOP_PACKAGES]
    extras = sorted({EXTRAS[name] for name in missing if name in EXTRAS})

    findings = [Finding(check="packages", verdict="ok", detail=", ".join(installed))]
    if required:
        findings = [replace(findings[0], verdict="wrong", fix=f"pip install {' '.join(required)}")]
    if extras:
        optional = ", ".join(name for name in missing if name in EXTRAS)
        findings.append(_missing_extra("extras", optional, ",".join(extras)))
    return findings


def _missing_extra(check: str, packages: str, extras: str) -> Finding:
    fix = f"If you need it: pip install 'mixtera-hpc[{extras}]'"
    return Finding(check=check, verdict="absent", detail=f"not installed: {packages}", fix=fix)


def _check_python() -> list[Finding]:
    interpreter = f"{platform.python_version()} {platform.machine()} {sys.executable}"
    versions = {name: installed_version(name) for name in PACKAGES}
    return [Finding(check="python", verdict="ok", detail=interpreter), *package_findings(versions)]


def _check_mpi_library() -> list[Finding]:
    if installed_version("mpi4py") is None:
        return [_missing_extra("mpi", "mpi4py", "mpi")]
    done = _run([sys.executable, "-m", "mixtera_hpc.comm.probe"], single_process=True)
    if done.returncode:
        fix = "Install an MPI: pip install mpich on a laptop; on a cluster load its module, or set MPI4PY_LIBMPI."
        return [Finding(check="mpi", verdict="wrong", detail=_last_line(done), fix=fix)]
    return [Finding(check="mpi", verdict="ok", detail=json.loads(done.stdout)["library"])]


def _check_mpiexec() -> list[Finding]:
    """Start two ranks. With the mpiexec of another MPI library, each of them would run alone."""
    if installed_version("mpi4py") is None:
        return []
    beside_python = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside_python) if beside_python.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        return [Finding(check="mpiexec", verdict="absent", detail="not found; on a cluster srun starts the ranks")]

    probe = [mpiexec, "-n", "2", sys.executable, "-m", "mixtera_hpc.comm.probe"]
    done = _run(probe, single_process=True)
    facts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    if facts.get("size") != 2:
        fix = f"Use the mpiexec of the MPI library above; {mpiexec} belongs to another one."
        return [Finding(check="mpiexec", verdict="wrong", detail=_last_line(done), fix=fix)]

    speed = f"broadcast {facts['broadcast_bytes_per_s'] / 1e9:.2f} GB/s between 2 ranks of this node"
    return [Finding(check="mpiexec", verdict="ok", detail=f"{mpiexec}: 2 ranks, {speed}")]


def _check_fabric() -> list[Finding]:
    """Check that libfabric can use a Slingshot network (CXI), where there is one."""
    cards = sorted(path.name for path in Path("/sys/class/cxi").glob("*"))
    if shutil.which("fi_info") is None:
        verdict: Verdict = "ok" if cards else "absent"
        return [Finding(check="fabric", verdict=verdict, detail=", ".join(cards) or "no fi_info, no CXI device")]

    done = _run(["fi_info", "-l"])
    providers = [line.rstrip(":") for line in done.stdout.splitlines() if line.endswith(":")]
    if cards and "cxi" not in providers:
        fix = (
            "This node has a Slingshot network, but libfabric has no cxi provider. MPI would use TCP, which is 10 to "
            "100 times slower. Load the site's libfabric."
        )
        return [Finding(check="fabric", verdict="wrong", detail=", ".join(providers), fix=fix)]
    return [Finding(check="fabric", verdict="ok", detail=f"libfabric providers: {', '.join(providers)}")]


def _check_file_system(runs_root: Path) -> list[Finding]:
    """Check that runs can be written, and locked in the way HDF5 does."""
    folder = runs_root if runs_root.is_dir() else Path.cwd()
    free_gb = shutil.disk_usage(folder).free / 1e9
    detail = f"{folder.resolve()}: {free_gb:,.0f} GB free"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fix = (
            "Set HDF5_USE_FILE_LOCKING=FALSE (the configs of known clusters do), or set MIXTERA_RUNS to a folder on "
            "another file system."
        )
        return [Finding(check="runs", verdict="wrong", detail=f"{detail}; {error}", fix=fix)]
    locking = os.environ.get("HDF5_USE_FILE_LOCKING", "unset")
    return [Finding(check="runs", verdict="ok", detail=f"{detail}, locks work, HDF5_USE_FILE_LOCKING {locking}")]


def _check_hdf5() -> list[Finding]:
    done = _run([sys.executable, "-c", "import h5py; print(h5py.version.hdf5_version)"])
    if done.returncode:
        return [Finding(check="hdf5", verdict="wrong", detail=_last_line(done), fix="pip install h5py")]
    return [Finding(check="hdf5", verdict="ok", detail=f"HDF5 {done.stdout.strip()}; indexes are opened without locks")]


def _check_slurm() -> list[Finding]:
    if shutil.which("sinfo") is None:
        detail = "no sinfo here; submit from a login node, or start a local cluster with make slurm-up"
        return [Finding(check="slurm", verdict="absent", detail=detail)]

    partitions = _run(["sinfo", "--noheader", "--format=%P %D nodes %l"])
    if partitions.returncode:
        fix = "Check with scontrol ping that the Slurm controller is up."
        return [Finding(check="slurm", verdict="wrong", detail=_last_line(partitions), fix=fix)]

    version = _run(["sinfo", "--version"]).stdout.strip()
    listed = ", ".join(line.strip() for line in partitions.stdout.splitlines())
    plugins = _run(["srun", "--mpi=list"])
    offered = " ".join((plugins.stdout + plugins.stderr).replace("MPI plugin types are...", "").split())
    return [
        Finding(check="slurm", verdict="ok", detail=f"{version}: {listed}"),
        Finding(check="srun --mpi", verdict="ok", detail=offered),
    ]


def _check_accounting() -> list[Finding]:
    if shutil.which("sacct") is None:
        return []
    done = _run(["sacct", "--noheader", "--allocations", "--starttime=now"])
    if done.returncode:
        detail = f"{_last_line(done)}; the end of a job is read from the record that its batch script writes"
        return [Finding(check="sacct", verdict="absent", detail=detail)]
    return [Finding(check="sacct", verdict="ok", detail="accounting answers")]


def _check_gpus() -> list[Finding]:
    if installed_version("torch") is None:
        return [_missing_extra("gpus", "torch", "train")]
    program = "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])"
    done = _run([sys.executable, "-c", program])
    if done.returncode:
        fix = "Check with python -c 'import torch' that torch can be imported."
        return [Finding(check="gpus", verdict="wrong", detail=_last_line(done), fix=fix)]
    names = done.stdout.strip()
    if names == "[]":
        return [Finding(check="gpus", verdict="absent", detail="torch finds no GPU")]
    return [Finding(check="gpus", verdict="ok", detail=names)]


def _run(command: Sequence[str], *, single_process: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command; failure to start it and a timeout become exit code 1.

    Args:
        command: The words of the command.
        single_process: Remove the launcher's variables, so that a probe does not take itself for a rank of the job in
            which the doctor runs.
    """
    environment = dict(os.environ)
    if single_process:
        environment = {k: v for k, v in environment.items() if not k.startswith(LAUNCHER_VARIABLES)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_LIMIT_S, env=environment, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"
