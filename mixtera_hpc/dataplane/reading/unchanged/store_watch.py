"""Refuse a token store that is written again while a run reads it.

`mixtera-hpc tokenize` removes the header of a store before it writes the store as a whole, and an `index refresh` only
appends. So the header and the state of the tokens are compared with those at the start, when `comparison_pace` says. If
only the change time of the tokens is new, as after `chmod` or `cp -p`, their first and last MiB decide.
Price: two `stat` calls per store and comparison.

It does not detect token ids that another program changes in place in the middle of a file above 2 MiB whose
modification time it restores, or after a refresh.
"""

from pathlib import Path

from mixtera_hpc.dataplane.reading.unchanged.file_state import FileState, file_state
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.token_store.store_files import StoredRows, StoreFiles, StoreHeader

__all__ = ["StoreWatch"]


class StoreWatch:
    """Compares a token store with its state at the start of the run. Not thread-safe."""

    def __init__(self, store: StoredRows) -> None:
        """Read the header of a store that rank 0 has checked.

        Raises:
            DataError: the store has been written again since then.
        """
        self._index = store.index
        self._tokens_digest: str | None = store.tokens_digest
        """Digest of the tokens at the start; None after a refresh, which appends tokens."""
        self._files = StoreFiles(Path(store.folder))
        # Looked up before the header is read: a later change then differs from these states.
        self._states = self._current_states()
        self._header = self._read_header()
        if not self._header.complete:
            raise self._error("it is incomplete")

    def check(self) -> None:
        """Compare the store.

        Raises:
            DataError: it was removed or written again.
        """
        states = self._current_states()
        if states == self._states:
            return
        before = self._header
        header = self._read_header()
        # Tokens that a refresh keeps have their old places.
        is_extended = header.complete or header.kept_tokens >= before.tokens
        if not is_extended or _encoding(header) != _encoding(before):
            raise self._error("it is being written again")
        if header != before:
            self._tokens_digest = None
        elif header.complete and self._has_other_tokens(states[-1]):
            raise self._error("its tokens have changed")
        self._header = header
        self._states = states

    def _has_other_tokens(self, state: FileState) -> bool:
        """Return True if the file of tokens was replaced or written, given its new state."""
        before = self._states[-1]
        if state._replace(ctime_ns=0) != before._replace(ctime_ns=0):
            return True
        if state == before or self._tokens_digest is None:
            return False
        return self._files.tokens_digest() != self._tokens_digest

    def _read_header(self) -> StoreHeader:
        header = self._files.read_header()
        if header is None:
            raise self._error("its header was removed")
        if self._index not in (header.index, *header.generations):
            raise self._error("it belongs to another index now")
        return header

    def _current_states(self) -> list[FileState]:
        try:
            return [file_state(path) for path in (self._files.header, self._files.tokens)]
        except OSError as error:
            raise self._error(f"{error.filename} cannot be found") from None

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"The token store {self._files.folder} has changed while the run reads it: {problem}.\n"
            "  Wait until mixtera-hpc tokenize has finished, and continue with mixtera-hpc resume; or continue with "
            "data.tokens=off."
        )


def _encoding(header: StoreHeader) -> tuple[int, str, str, str]:
    """Return everything beside the index that decides which tokens a store has."""
    return header.version, header.tokenizer, header.dtype, header.chat_loss
