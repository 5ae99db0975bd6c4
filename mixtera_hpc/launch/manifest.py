"""Record where a run came from: code, versions, host, and selected environment variables.

Only variables on an allow-list are recorded. The whole environment would leak keys and tokens.
"""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "collect_manifest", "git_diff", "git_state", "installed_version", "visible_environment"]

GIT_LIMIT_S = 30

PACKAGES = (
    *("mixtera-hpc", "numpy", "torch", "mpi4py", "mpich", "h5py", "pyarrow", "gigatoken", "tokenizers"),
    *("hydra-core", "omegaconf", "submitit", "matplotlib"),
)
"""The distributions whose versions a run records, and that the doctor looks for."""

_NAMES = frozenset(
    [
        *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "MIXTERA_CONF", "MIXTERA_RUNS"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONPATH", "SCRATCH", "VIRTUAL_ENV", "LOADEDMODULES"),
    ]
)
_PREFIXES = ("FI_", "HDF5_", "MPI4PY_", "MPICH_", "MPIR_", "NCCL_", "OMPI_MCA_", "OMP_", "PMIX_MCA_", "SLURM_", "UENV_")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "JWT")


def collect_manifest(container: str | None = None) -> dict[str, Any]:
    """Return what may explain a result later, as JSON types.

    Args:
        container: `environment.image`, if the run uses one.
    """
    return {
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "git": git_state(),
        "container": _describe_container(container),
        "environment": visible_environment(os.environ),
    }


def visible_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables on the allow-list, except those whose name suggests a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not any(word in name for word in _SECRETS)
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout that holds this package, and whether files differ from it; None elsewhere."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def git_diff() -> str:
    """Return the difference to that commit as a patch; empty if there is none."""
    return _git("diff", "HEAD") or ""


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    # `git status` writes to the index. If it was stopped after the limit, its lock would remain and block the user.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_LIMIT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _describe_container(name: str | None) -> dict[str, str] | None:
    """Return the container's name and, if a TOML file describes it, that file's text."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return {"name": name, "text": path.read_text()}
    return {"name": name}
