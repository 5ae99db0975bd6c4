"""Find where documents are stored as token ids.

Which special tokens a stored document begins and ends with follows from its length and from the tokens that the index
counted, so no token is read for it. Only if a tokenizer has one token that begins documents, a document with one more
token than counted is ambiguous: its last token decides.
Price: about 40 numpy calls per read, 40 ns per document, and 4 bytes of memory per block. If all epochs have the same
order, or there are more files than can be mapped, places stay in memory, 17 bytes per document of the window table.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.lookup.columns import GrowingColumns, concatenated_ranges
from mixtera_hpc.dataplane.reading.lookup.window_table import WindowTable
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import MAX_MAPPED_FILES, MappedFiles, file_groups
from mixtera_hpc.dataplane.reading.stored.read_errors import (
    no_tokenizer_error,
    range_outside_error,
    token_count_error,
)
from mixtera_hpc.dataplane.reading.stored.store_rows import StoreRows
from mixtera_hpc.errors import DataError
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["DocumentPlaces", "Places"]

Ints = NDArray[np.int64]
UNKNOWN = -1
"""The value of `missing` for a document that was not located."""


@dataclass(frozen=True, slots=True)
class Places:
    """Places of documents in files; shape (n,) each."""

    file: NDArray[np.int32]
    start: Ints
    """First stored token that may be wanted, counted in the file."""
    missing: NDArray[np.int8] | None
    """Special tokens of each document that are not stored with it; None if all are."""

    def select(self, chosen: NDArray[np.intp]) -> "Places":
        """Return some of the places."""
        missing = None if self.missing is None else self.missing[chosen]
        return Places(self.file[chosen], self.start[chosen], missing)


class DocumentPlaces:
    """The places of documents in shards and token stores. Not thread-safe."""

    def __init__(self, source: Source, is_stored: NDArray[np.bool_], files: MappedFiles) -> None:
        """Locate nothing yet.

        Args:
            source: the data.
            is_stored: mask of the blocks that are stored as token ids; shape (num_blocks,).
            files: the shards, and behind them the token stores.

        Raises:
            DataError: a store has changed since rank 0 checked it.
        """
        self._source = source
        self._is_stored = is_stored
        self._files = files
        self._num_shards = len(source.index.shard_paths)
        self._file_of_block = source.blocks.shard.astype(np.int32)
        self._store_rows = StoreRows(source, self._file_of_block) if source.index.token_stores else None
        num_files = self._num_shards + len(source.index.token_stores)
        # Places stay in memory where they are needed again. Without room for all files, a read would map them twice:
        # to locate documents, and to copy tokens.
        self._has_runs = source.layout.order.repeats
        self._stores_places = self._has_runs or num_files > MAX_MAPPED_FILES
        self._table: WindowTable | None = None
        self._columns = GrowingColumns({"file": np.int32, "start": np.int64, "missing": np.int8, "run": np.int32})
        """One row per document of `_table`. Documents of a window with the same `run`, and those between them, follow
        each other in one file, with nothing between them."""

    @property
    def is_in_shard(self) -> NDArray[np.bool_]:
        """Mask of the blocks that are stored as token ids in their shard, and not in a token store."""
        return self._is_stored & (self._file_of_block < self._num_shards)

    def locate(self, documents: Documents) -> Places:
        """Return the places of documents, all of which are stored as token ids.

        Raises:
            DataError: a shard cannot be read or has changed, or a document has other tokens than the index counted.
        """
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        if not self._stores_places:
            return self._find(documents, tokenizer)
        self._add_rows(documents.windows)
        missing = self._columns["missing"][documents.number]
        unknown = np.flatnonzero(missing == UNKNOWN)
        if len(unknown):
            self._locate_windows(documents.select(unknown), tokenizer)
            missing = self._columns["missing"][documents.number]
        return Places(
            file=self._columns["file"][documents.number],
            start=self._columns["start"][documents.number],
            missing=missing if missing.any() else None,
        )

    def joined(self, documents: Documents) -> Documents:
        """Return the same wanted tokens as fewer documents, each of which stands for those that follow it in its file.

        Only the tokens that are wanted of the result have a meaning. Documents whose places are not in memory stay.
        """
        sizes = documents.part_sizes
        if sizes is None or not self._has_runs:
            return documents
        self._add_rows(documents.windows)
        run = self._columns["run"]
        stop = sizes.cumsum()
        chosen = stop - sizes
        first_run = run.take(documents.number.take(chosen))
        if (first_run == UNKNOWN).any():
            return documents
        is_run = first_run == run.take(documents.number.take(stop - 1))
        if not is_run.all():
            chosen = concatenated_ranges(chosen, np.where(is_run, 1, sizes))
        wanted_starts = documents.wanted_stops.take(chosen) - documents.wanted.take(chosen)
        wanted = np.empty_like(wanted_starts)
        np.subtract(wanted_starts[1:], wanted_starts[:-1], out=wanted[:-1])
        wanted[-1] = documents.wanted_stops[-1] - wanted_starts[-1]
        begin = documents.first.take(chosen)
        number = documents.number.take(chosen)
        return Documents(windows=documents.windows, number=number, first=begin, last=begin + wanted)

    def _add_rows(self, table: WindowTable) -> None:
        """Add rows for the documents that `table` has got since the last call; begin again if it is another table."""
        if table is not self._table:
            self._table = table
            self._columns.clear()
        count = table.num_rows - len(self._columns)
        if count:
            zeros = np.zeros(count, np.int8)
            unknown = np.full(count, UNKNOWN)
            self._columns.append({"file": zeros, "start": zeros, "missing": unknown, "run": unknown})

    def _locate_windows(self, documents: Documents, tokenizer: Tokenizer) -> None:
        """Keep the places of documents, and if no token has to be read for it, of all documents of their windows."""
        if len(tokenizer.bos_ids) != 1:
            table = documents.windows
            of_windows = table.documents_of(np.unique(documents.window))
            whole = Documents(windows=table, number=of_windows, first=of_windows, last=of_windows)
            whole = whole.select(np.flatnonzero(self._is_stored[whole.block]))
            try:
                places = self._write(whole, tokenizer)
            except DataError:
                # An error in another document of the window is raised when that document is served.
                pass
            else:
                # The tokens that are missing belong between documents, so these are copied one by one.
                if self._has_runs and places.missing is None:
                    self._add_runs(whole, places)
                return
        self._write(documents, tokenizer)

    def _add_runs(self, documents: Documents, places: Places) -> None:
        """Find the runs of all stored documents of some windows, whose places are known."""
        stop = places.start + documents.size
        is_first = np.ones(len(stop), np.bool_)
        is_first[1:] = (places.file[1:] != places.file[:-1]) | (places.start[1:] != stop[:-1])
        self._columns["run"][documents.number] = is_first.cumsum()

    def _write(self, documents: Documents, tokenizer: Tokenizer) -> Places:
        """Write the places of documents to their rows, and return them."""
        places = self._find(documents, tokenizer)
        self._columns["file"][documents.number] = places.file
        self._columns["start"][documents.number] = places.start
        self._columns["missing"][documents.number] = 0 if places.missing is None else places.missing
        return places

    def _find(self, documents: Documents, tokenizer: Tokenizer) -> Places:
        """Locate documents, as many files at a time as can be mapped."""
        file = self._file_of_block[documents.block]
        distinct = self._files.distinct(file)
        is_of_one_kind = distinct[-1] < self._num_shards or distinct[0] >= self._num_shards
        if is_of_one_kind and len(distinct) <= MAX_MAPPED_FILES:
            return self._find_in_files(documents, file, distinct, tokenizer)
        start = np.zeros(len(file), np.int64)
        missing = np.zeros(len(file), np.int8)
        in_store = file >= self._num_shards
        for of_kind in (np.flatnonzero(~in_store), np.flatnonzero(in_store)):
            for group in file_groups(file[of_kind]):
                chosen = of_kind[group]
                if len(chosen):
                    own = file[chosen]
                    places = self._find_in_files(documents.select(chosen), own, self._files.distinct(own), tokenizer)
                    start[chosen] = places.start
                    missing[chosen] = 0 if places.missing is None else places.missing
        return Places(file, start, missing)

    def _find_in_files(
        self, documents: Documents, file: NDArray[np.int32], distinct: NDArray[np.intp], tokenizer: Tokenizer
    ) -> Places:
        """Locate documents that are all in shards or all in stores.

        Args:
            documents: of any block.
            file: of each document.
            distinct: the different files, all of which can be mapped.
            tokenizer: names the special tokens.
        """
        layout = self._source.layout
        itemsize = self._files.item_sizes(distinct)
        # Nearly always all files have one integer type.
        itemsize = itemsize[0] if (itemsize == itemsize[0]).all() else self._files.item_sizes(file)
        # One number, or one for each document.
        num_specials = layout.num_specials if layout.chat_blocks is None else layout.added_tokens(documents.block)
        if self._store_rows is None or distinct[0] < self._num_shards:
            return self._find_in_shards(documents, file, itemsize, num_specials, tokenizer)
        start = self._store_rows.starts(documents, file)
        free = self._files.num_bytes(file) // itemsize - start - documents.size + num_specials
        if ((start | free) < 0).any():
            raise range_outside_error(self._source, documents)
        missing = np.full(len(file), num_specials, np.int8) if np.any(num_specials) else None
        return Places(file, start, missing)

    def _find_in_shards(
        self,
        documents: Documents,
        file: NDArray[np.int32],
        itemsize: Ints,
        num_specials: Ints | int,
        tokenizer: Tokenizer,
    ) -> Places:
        """Locate documents in shards; see `_find_in_files`."""
        source = self._source
        start = source.blocks.offset[documents.block] + documents.offset
        length = documents.length
        either = start | length
        free = self._files.num_bytes(file) - start - length
        if ((either | free) < 0).any() or (either & (itemsize - 1)).any():
            raise range_outside_error(source, documents)

        start //= itemsize
        num_stored = length // itemsize
        # A wrong count would shift every later sequence of the stream without a sign.
        counted = documents.size - num_specials
        begins, ends = self._stored_specials(file, start, num_stored, counted, tokenizer)
        num_bos = len(tokenizer.bos_ids)
        wrong = np.flatnonzero(num_stored != counted + begins * num_bos + ends)
        if len(wrong):
            number = int(wrong[0])
            size = int((num_stored - begins * num_bos - ends + num_specials)[number])
            raise token_count_error(source, documents, number, size)
        # A stored token that ends the document is served from its place, if nothing else is to follow the text.
        in_place = ends & (tokenizer.added.after == (tokenizer.eos_id,))
        missing = np.where(num_specials, num_specials - in_place, 0).astype(np.int8)
        return Places(file, start + begins * num_bos, missing if missing.any() else None)

    def _stored_specials(
        self, file: NDArray[np.int32], start: Ints, count: Ints, counted: Ints, tokenizer: Tokenizer
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which documents are stored with the tokens that begin documents, and which with `eos_id`.

        Args:
            file: mapped file of each document.
            start: first token of each document in its file.
            count: stored tokens.
            counted: tokens that the index counted, which are those of the text.
            tokenizer: names the special tokens.
        """
        num_bos = len(tokenizer.bos_ids)
        more = count - counted
        begins = np.zeros(len(more), np.bool_)
        ends = begins if tokenizer.eos_id is None else more == 1
        if not num_bos:
            return begins, ends
        begins = (more == num_bos) | (more == num_bos + 1)
        if tokenizer.eos_id is not None:
            ends |= more == num_bos + 1
        ambiguous = np.flatnonzero(ends & begins & (more == 1))
        if len(ambiguous):
            last = self._files.tokens_at(file[ambiguous], start[ambiguous] + count[ambiguous] - 1)
            ends[ambiguous] = last == tokenizer.eos_id
            begins[ambiguous] = ~ends[ambiguous]
        return begins, ends
