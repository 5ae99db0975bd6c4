"""Print texts of users and data without letting them control the terminal: see `report.safe_text`."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from mixtera_hpc.report.safe_text import escape_controls

__all__ = ["escaped_output", "open_closed_streams", "terminal"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk of a log takes no more."""


class _EscapingStream:
    """A text stream that shows control characters; everything else is done by the stream below."""

    def __init__(self, stream: TextIO, *, is_log: bool = False) -> None:
        """Wrap `stream`; `is_log` drops what a full disk does not take: a log must not end a training."""
        self.stream = stream
        self._is_log = is_log

    def write(self, text: str) -> int:
        try:
            return self._write(text)
        except OSError as error:
            if not self._is_log or error.errno not in _FULL:
                raise
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            if not self._is_log or error.errno not in _FULL:
                raise

    def _write(self, text: str) -> int:
        escaped = escape_controls(text)
        try:
            self.stream.write(escaped)
        except UnicodeEncodeError as error:  # The encoding of the terminal or the pipe, such as Latin-1.
            self.stream.write("".join(_in_encoding(character, error.encoding) for character in escaped))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _in_encoding(character: str, encoding: str) -> str:
    """Return a character, or its escape as in JSON if the encoding does not have it."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(character)[1:-1]
    return character


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to `sys.stdout` and `sys.stderr`. A verb that runs another verb escapes once."""
    if isinstance(sys.stdout, _EscapingStream):
        yield
        return
    output: Any = _EscapingStream(sys.stdout)
    errors: Any = _EscapingStream(sys.stderr, is_log=True)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        yield


def open_closed_streams() -> None:
    """Open standard streams that are closed (`>&-`) on /dev/null: the next file would get the number of one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest number that is free. Programs that are started need these streams as well.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def terminal(stream: TextIO) -> TextIO:
    """Return the stream below `stream`, for escape sequences of our own."""
    return stream.stream if isinstance(stream, _EscapingStream) else stream
