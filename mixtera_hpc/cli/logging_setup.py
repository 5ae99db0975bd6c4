"""Show the messages of `logging.getLogger("mixtera_hpc")` on standard error while a verb runs.

The library only logs. A trainer that imports it routes the messages as it likes; the command line prints them plainly.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["messages_on_stderr"]


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Print progress as it is and warnings with their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Print messages from INFO on. A verb that runs another verb prints them once."""
    logger = logging.getLogger("mixtera_hpc")
    if any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        yield
        return

    handler = _StderrHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
