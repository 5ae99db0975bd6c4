"""Token ids that a scan makes while it counts tokens, kept on disk until the index is complete.

Every scanning thread appends the ids of its documents to a file of its own. The log of the scan says where the ids of
each result are, so a build that is killed continues with both. Price: the ids are on disk twice for a while.
"""

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import ConfigError

__all__ = ["SPOOL_FOLDER", "SpooledTokens", "TokenSpool", "TokenSpools"]

SPOOL_FOLDER = ".spool"
"""Name of the folder below that of a token store."""


class SpooledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The place of the token ids of one scan result."""

    file: str
    """Name of a file in the folder of the spools."""
    dtype: str
    start: int
    """Ids of the file before those of the result."""
    count: int


class TokenSpool:
    """The file of one thread, open for appending."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Create the file; only one thread of one attempt uses its name."""
        self.name = path.name
        self.dtype = dtype
        self.position = 0
        """Ids in the file."""
        self._file = path.open("xb")

    def append(self, tokens: NDArray[np.uint32]) -> None:
        """Append the ids of some documents; shape (n,)."""
        with self._explain_disk_errors():
            self._file.write(tokens.astype(self.dtype, copy=False).data)
        self.position += len(tokens)

    def sync(self) -> None:
        """Write everything to the disk: a log that names ids must not reach it before them."""
        with self._explain_disk_errors():
            self._file.flush()
            os.fdatasync(self._file.fileno())

    @contextmanager
    def _explain_disk_errors(self) -> Iterator[None]:
        """Say what to do if the disk does not take the ids. A scan takes an OSError for one of the shard."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"The token ids cannot be written to {Path(self._file.name).parent}: {error.strerror}.\n"
                "  Everything that was scanned stays. Make room and run the same command again: it continues. Or set "
                "data.tokens to a folder on another file system, or data.materialize=never."
            ) from None


class TokenSpools:
    """The files of all threads of one rank."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], rank: int) -> None:
        """Open nothing yet."""
        self.folder = folder
        self.dtype = dtype
        self._rank = rank
        self._numbers = itertools.count()
        self._own = threading.local()

    def of_thread(self, attempt: int) -> TokenSpool:
        """Return the file of the calling thread; it is created at the first call."""
        spool: TokenSpool | None = getattr(self._own, "spool", None)
        if spool is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{attempt:03d}-{self._rank:05d}-{next(self._numbers):03d}.tokens"
            spool = self._own.spool = TokenSpool(self.folder / name, self.dtype)
        return spool

    def remove(self) -> None:
        """Remove the files of all ranks and attempts."""
        shutil.rmtree(self.folder, ignore_errors=True)
