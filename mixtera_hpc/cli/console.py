"""What is printed, as people read it."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["open_console", "pluralize"]


def pluralize(number: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def open_console(*, soft_wrap: bool = False) -> "Console":
    """A terminal as wide as it is, anything else 160 columns wide, so that files and pipes get whole names.

    Nothing in a text is markup: names of domains may have brackets. A reader that has left is `BrokenPipeError`, for `main` to answer; rich would leave the process with 1.
    """
    from rich.console import Console

    class Stdout(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Stdout(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=soft_wrap, markup=False)
