"""Functions of the user's, over rows (`data.parser`) or documents (`data.properties.NAME.function`).

They are imported by name, from the user's own code, when the index is built and never later. A digest of the file one is
written in is part of what a build goes on from, so one that was interrupted does not mix the results of two versions.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["import_function", "source_digest"]

Function = Callable[[Any], Any]


def source_digest(function: Function) -> str:
    """Hex digest of the file that a function is written in; the same for all that have none."""
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # Written in C, or an object that can be called.
        source = None
    content = Path(source).read_bytes() if source and Path(source).is_file() else b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def import_function(path: str, key: str) -> Function:
    """Import the function at `package.module.function`, which the configuration names under `key`.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key} is {path!r}, expected package.module.function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key} is {path!r}, but {module_name} cannot be imported: {type(error).__name__}: {error}.\n"
            "  Install the package it is in, or put its folder on PYTHONPATH."
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        problem = "is not there" if found is None else f"is of type {type(found).__name__}, no function"
        raise ConfigError(
            f"{key} is {path!r}, but {name} {problem} in {module_name} ({module.__file__})."
            f"{did_you_mean(name, _functions(module))}\n  Name a function of that module, or write it there."
        )
    function: Function = found
    return function


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
