"""Mixtera-HPC: a Slurm-integrated data plane for foundation-model training.

The names of `__all__` are the public interface. Each is imported when it is first used, so that `import mixtera_hpc`
imports neither numpy nor torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.comm.communicator import Communicator
    from mixtera_hpc.config.compose import compose, load_config
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.dataplane.plane import DataPlane
    from mixtera_hpc.dataplane.reading.batches import Batch
    from mixtera_hpc.dataplane.reading.sample_transform import CostedSample, ServedSample
    from mixtera_hpc.errors import (
        CommError,
        ConfigError,
        DataError,
        LaunchError,
        MixteraError,
        MixtureError,
        PropertyIndexError,
        SavedAndStopped,
        UserError,
    )
    from mixtera_hpc.integrations.process_group import Replicas
    from mixtera_hpc.integrations.torch import PlaneDataset

__all__ = [
    "Batch",
    "CommError",
    "Communicator",
    "ConfigError",
    "CostedSample",
    "DataError",
    "DataPlane",
    "LaunchError",
    "MixteraError",
    "MixtureError",
    "PlaneDataset",
    "PropertyIndexError",
    "Replicas",
    "RunFolder",
    "SavedAndStopped",
    "ServedSample",
    "UserError",
    "__version__",
    "compose",
    "load_config",
]
__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "Batch": "mixtera_hpc.dataplane.reading.batches",
    "CommError": "mixtera_hpc.errors",
    "Communicator": "mixtera_hpc.comm.communicator",
    "ConfigError": "mixtera_hpc.errors",
    "CostedSample": "mixtera_hpc.dataplane.reading.sample_transform",
    "DataError": "mixtera_hpc.errors",
    "DataPlane": "mixtera_hpc.dataplane.plane",
    "LaunchError": "mixtera_hpc.errors",
    "MixteraError": "mixtera_hpc.errors",
    "MixtureError": "mixtera_hpc.errors",
    "PlaneDataset": "mixtera_hpc.integrations.torch",
    "PropertyIndexError": "mixtera_hpc.errors",
    "Replicas": "mixtera_hpc.integrations.process_group",
    "RunFolder": "mixtera_hpc.config.run_folder",
    "SavedAndStopped": "mixtera_hpc.errors",
    "ServedSample": "mixtera_hpc.dataplane.reading.sample_transform",
    "UserError": "mixtera_hpc.errors",
    "compose": "mixtera_hpc.config.compose",
    "load_config": "mixtera_hpc.config.compose",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    except ModuleNotFoundError as error:
        from mixtera_hpc.errors import missing_package  # Here, so that `import mixtera_hpc` imports nothing else.

        raise missing_package(error) or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
