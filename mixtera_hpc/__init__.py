"""Mixtera-HPC: a Slurm-integrated data plane for foundation-model training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.config.compose import compose
    from mixtera_hpc.dataplane.plane import Batch, DataPlane

__all__ = ["Batch", "DataPlane", "__version__", "compose"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names only when they are asked for, so that the command line stays fast."""
    if name == "compose":
        from mixtera_hpc.config.compose import compose

        return compose
    if name in ("Batch", "DataPlane"):
        from mixtera_hpc.dataplane import plane

        return getattr(plane, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
