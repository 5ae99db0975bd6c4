"""Print texts of users and data without letting them control the terminal: see `report.safe_text`."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from mixtera_hpc.report.safe_text import escape_controls

__all__ = ["escaped_output", "terminal"]


class _EscapingStream:
    """A text stream that shows control characters; everything else is done by the stream below."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to `sys.stdout` and `sys.stderr`. A verb that runs another verb escapes once."""
    if isinstance(sys.stdout, _EscapingStream):
        yield
        return
    output: Any = _EscapingStream(sys.stdout)
    errors: Any = _EscapingStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        yield


def terminal(stream: TextIO) -> TextIO:
    """Return the stream below `stream`, for escape sequences of our own."""
    return stream.stream if isinstance(stream, _EscapingStream) else stream
