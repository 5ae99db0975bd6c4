"""Where a run came from: code, versions, host and an allow-list of the environment; never all of it, keys would leak."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "git_diff", "git_state", "installed_version", "manifest", "visible_environment"]

PACKAGES = (
    *("mixtera-hpc", "numpy", "torch", "mpi4py", "mpich", "h5py", "pyarrow", "gigatoken", "tokenizers"),
    *("hydra-core", "omegaconf", "submitit"),
)

_NAMES = frozenset(
    [
        *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "MIXTERA_CONF", "MIXTERA_RUNS"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONPATH", "SCRATCH", "VIRTUAL_ENV", "LOADEDMODULES"),
    ]
)
_PREFIXES = ("FI_", "HDF5_", "MPI4PY_", "MPICH_", "MPIR_", "NCCL_", "OMPI_MCA_", "OMP_", "PMIX_MCA_", "SLURM_", "UENV_")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "JWT")


def manifest(container: str | None = None) -> dict[str, Any]:
    """Everything here that might explain a result one day; fit for JSON."""
    return {
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "git": git_state(),
        "container": _container(container),
        "environment": visible_environment(os.environ),
    }


def visible_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables on the allow-list, without any whose name smells of a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not any(word in name for word in _SECRETS)
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether files differ from it; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def git_diff() -> str:
    """What differs from that commit, as a patch; empty when nothing does."""
    return _git("diff", "HEAD") or ""


def _git(*words: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def installed_version(name: str) -> str | None:
    """Version of a distribution; None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _container(named: str | None) -> dict[str, str] | None:
    """The container and, where it is described by a file, that file's text."""
    if named is None:
        return None
    path = Path(named)
    text = path.suffix == ".toml" and path.is_file()
    return {"name": named, "text": path.read_text()} if text else {"name": named}
