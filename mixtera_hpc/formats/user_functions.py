"""Import the user's functions: the row parser (`data.parser`) and properties (`data.properties.NAME.function`).

They are imported only while the index is built. A digest of the source file is part of the
state of a build, so that a continued build does not mix the results of two versions.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, did_you_mean

__all__ = ["import_function", "source_digest"]

Function = Callable[[Any], Any]


def source_digest(function: Function) -> str:
    """Return the hex digest of a function's source file; the same digest for all functions without one."""
    # The digest covers the whole file: helper functions in it may change the result as well.
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # A function written in C, or a callable object.
        source = None
    content = Path(source).read_bytes() if source and Path(source).is_file() else b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def import_function(path: str, key: str) -> Function:
    """Import the function `package.module.function`.

    Args:
        path: dotted path of the function.
        key: the config key that names it, for messages.

    Raises:
        ConfigError: the function cannot be imported, or the name is not a function.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key} is {path!r}; expected package.module.function.")
    # Importing runs the user's code, which may raise anything.
    try:
        module = importlib.import_module(module_name)
    except USER_CODE_ERRORS as error:
        raise ConfigError(
            f"{key} is {path!r}, but {module_name} cannot be imported: {type(error).__name__}: {error}.\n"
            "  Install its package, or add its folder to PYTHONPATH."
        ) from None

    function: Function | None = getattr(module, name, None)
    if function is None or not callable(function):
        problem = "does not exist" if function is None else f"is of type {type(function).__name__}, not a function,"
        raise ConfigError(
            f"{key} is {path!r}, but {name} {problem} in {module_name} ({module.__file__})."
            f"{did_you_mean(name, _public_functions(module))}\n  Name a function of that module, or define it there."
        )
    return function


def _public_functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
