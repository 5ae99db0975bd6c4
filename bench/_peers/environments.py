"""The Python environments of the peers. Each is made when it is first needed, in bench/out/peers/environments."""

import shutil
import subprocess
import sys
from pathlib import Path

from bench._results import OUT

__all__ = ["OURS", "PEERS", "Missing", "interpreter"]

OURS = "mixtera-hpc"
"""The environment that runs this program; the bare loops run in it too."""

# Any other specification of torch installs gigabytes of CUDA.
_TORCH = "torch==2.13.0"
_TEXT = ("msgspec", "gigatoken", "tokenizers")
PEERS: dict[str, tuple[str, ...]] = {
    "torchdata": ("torchdata==0.11.0", _TORCH, "numpy", *_TEXT),
    "litdata": ("litdata==0.2.76", _TORCH, "numpy", "msgspec"),
    "huggingface": ("datasets==5.2.0", "zstandard", "tokenizers", "msgspec"),
    "grain": ("grain==0.2.18", "msgspec"),
    "megatron": ("megatron-core==0.16.1", _TORCH, "numpy"),
}
"""Name of an environment → what pip installs in it. The first is the peer."""

_SHARED = ("gigatoken", "msgspec", "numpy", "pyarrow", "tokenizers", "torch", "zstandard")
"""Libraries that have the same version in all environments, that of constraints.txt.

The other lines of constraints.txt do not fit all peers.
"""

_FOLDER = OUT / "peers" / "environments"
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
_INSTALL_LIMIT_S = 900


class Missing(Exception):
    """The environment of a peer cannot be made; the text says why."""


def interpreter(name: str) -> Path:
    """Return the Python interpreter of an environment; install the environment unless it exists.

    Raises:
        Missing: the installation failed.
    """
    if name == OURS:
        return Path(sys.executable)
    folder = _FOLDER / name
    ready = folder / "ready"
    # The file holds what was installed, so that other versions are installed anew.
    content = "\n".join(PEERS[name])
    if not ready.exists() or ready.read_text() != content:
        print(f"installing {PEERS[name][0]} in {folder}", flush=True)
        _install(name, folder)
        ready.write_text(content)
    return folder / "bin" / "python"


def _install(name: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    folder.mkdir(parents=True)
    constraints = folder / "constraints.txt"
    lines = _CONSTRAINTS.read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if line.partition("==")[0] in _SHARED))
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "-c", constraints, *PEERS[name]],
    ]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise Missing(f"installing {PEERS[name][0]} took more than {_INSTALL_LIMIT_S} s") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Missing(f"{PEERS[name][0]} cannot be installed: {(errors or [done.stderr.strip()[-200:]])[0]}")
