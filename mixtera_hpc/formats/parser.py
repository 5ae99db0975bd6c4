"""The escape hatch for properties that no dotted path reaches: a function of the user's, from a row to a dict.

It is imported by its name, from the user's own code, when the index is built and never later. A digest of the file it is
written in goes into the index's identity, so a build that was interrupted does not mix the results of two versions.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mixtera_hpc.errors import ConfigError, did_you_mean
from mixtera_hpc.formats.format import Parser

__all__ = ["describe_parser", "load_parser"]

Function = Callable[[Any], Any]


def describe_parser(path: str, key: str = "data.parser") -> Parser:
    """What identifies the function at an import path, which the configuration names under `key`.

    Raises:
        ConfigError: there is none.
    """
    try:
        source = inspect.getsourcefile(inspect.unwrap(load_parser(path, key)))
    except TypeError:  # Written in C, or an object that can be called.
        source = None
    content = Path(source).read_bytes() if source and Path(source).is_file() else b""
    return Parser(path=path, fingerprint=hashlib.blake2b(content, digest_size=16).hexdigest())


def load_parser(path: str, key: str = "data.parser") -> Function:
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
        problem = "is not there" if found is None else f"is a {type(found).__name__}, no function"
        raise ConfigError(
            f"{key} is {path!r}, but {name} {problem} in {module_name} ({module.__file__})."
            f"{did_you_mean(name, _functions(module))}\n  Name a function of that module, or write it there."
        )
    function: Function = found
    return function


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
