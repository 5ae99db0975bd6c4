"""Format what verbs print."""

import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["open_console", "print_json"]

PIPE_COLUMNS = 160
"""Width of output to a file or a pipe."""


def print_json(value: object) -> None:
    """Print one JSON object on a line; NaN becomes null."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def open_console(*, soft_wrap: bool = False) -> "Console":
    """Return a console as wide as the terminal; for files and pipes it has 160 columns, so that names stay whole.

    Markup is off, because names of domains may contain brackets, and styles are off, because escape sequences are shown
    and not sent to the terminal (see `safe_output`). If the reader closes the pipe, the console raises
    `BrokenPipeError` for `main` to handle; rich itself would end the process with exit code 1.
    """
    # Imported here because rich takes 0.1 s, and most verbs print plain text.
    from rich.console import Console

    class StdoutConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return StdoutConsole(width=width, highlight=False, soft_wrap=soft_wrap, markup=False, color_system=None)
