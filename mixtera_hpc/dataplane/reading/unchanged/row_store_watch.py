"""Refuse a row store that is written again while a run reads it.

An `index refresh` only adds files: it copies the places of earlier rows and uses new file names. A store that is
removed and built again may use earlier file names for other content. So the header and the file of places
are compared with those at the start, when `comparison_pace` says. Price: two `stat` calls per store and comparison.
"""

from pathlib import Path

from mixtera_hpc.dataplane.reading.unchanged.file_state import FileState, file_state
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.row_store.row_files import RowStoreFiles, RowStoreHeader, StoredRowBlocks

__all__ = ["RowStoreWatch"]


class RowStoreWatch:
    """Compares a row store with its state at the start of the run. Not thread-safe."""

    def __init__(self, store: StoredRowBlocks) -> None:
        """Read the header of a store that rank 0 has checked.

        Raises:
            DataError: the store has been written again since then.
        """
        self._files = RowStoreFiles(Path(store.folder))
        self._num_blocks = store.last_block - store.first_block
        # Looked up before the header is read: a later change then differs from this state.
        self._header_state = self._state(self._files.header)
        self._header = self._read_header()
        if self._files.folder / self._header.places != Path(store.places):
            raise self._error("it belongs to another index now")
        self._places_inode = self._state(Path(store.places)).inode

    def check(self) -> None:
        """Compare the store.

        Raises:
            DataError: it was removed or written again.
        """
        state = self._state(self._files.header)
        if state != self._header_state:
            self._compare_header(self._read_header())
            self._header_state = state
        if self._state(self._files.folder / self._header.places).inode != self._places_inode:
            raise self._error("it was written again")

    def _compare_header(self, header: RowStoreHeader) -> None:
        """Accept the same header, or that of a refresh, which keeps the earlier rows."""
        before = self._header
        if header.places == before.places:
            return
        is_refresh = before.index in header.generations and header.kept_blocks >= self._num_blocks
        if header.version != before.version or not is_refresh:
            raise self._error("it is being written again")
        self._header = header
        self._places_inode = self._state(self._files.folder / header.places).inode

    def _read_header(self) -> RowStoreHeader:
        header = self._files.read_header()
        if header is None:
            raise self._error("its header was removed")
        return header

    def _state(self, path: Path) -> FileState:
        try:
            return file_state(path)
        except OSError:
            raise self._error(f"{path} cannot be found") from None

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"The row store {self._files.folder} has changed while the run reads it: {problem}.\n"
            "  Wait until mixtera-hpc index build has finished, and continue with mixtera-hpc resume; or continue with "
            "data.materialize=never."
        )
