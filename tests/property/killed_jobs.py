"""A job that ends before one of its calls that open or change files, as if it were killed there."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Killed", "killed_before"]

CALLS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "fdatasync"),
    (os, "pwrite"),
    (os, "write"),
    (shutil, "copyfile"),
    (Path, "open"),
    (Path, "replace"),
    (Path, "unlink"),
]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@contextmanager
def killed_before(call: int) -> Iterator[None]:
    """Let a job end before one of the calls that open or change files, given its number."""
    numbers = itertools.count()

    def patched(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == call:
                raise Killed
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, patched(getattr(module, name)))
        yield
