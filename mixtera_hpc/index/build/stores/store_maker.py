"""Make the store of an index while it is built (`data.materialize`): tokens, or rows with `mixture.unit=samples`.

A build decodes and tokenizes every document to count its tokens. Here it keeps the ids: each scanning thread appends
them to a file below the folder of the store, and they are copied to their places when the index is complete. Price:
the size of the store on disk once more while the index is built, and one more write and read of it; nothing is decoded
or tokenized twice. Rows are written in a second pass, which decodes the files once more.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.decoded_sizes import decodes_files, expansion_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.index_job import ScanPlan, UnitRecords
from mixtera_hpc.index.row_store.row_files import RowStoreFiles
from mixtera_hpc.index.row_store.row_job import RowPlan, RowReport, write_rows
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.token_spool import TokenSpool, TokenSpools
from mixtera_hpc.index.shards import Shard
from mixtera_hpc.index.token_store.store_files import OFF, StoreFiles, store_folder, token_type
from mixtera_hpc.index.token_store.store_job import SpooledResult, StoreReport, StoreSources, write_store
from mixtera_hpc.index.token_store.store_state import KeptRows, StorePlan
from mixtera_hpc.tokens.stored_token_ids import StoredTokenIds
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["AnnounceStore", "StoreEstimate", "StoreMaker"]

BYTES_PER_TOKEN = 4.0
"""Decoded bytes of a JSON line for each token, a typical value: the size of a store is known only after the scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEstimate:
    """The size of a token store, before the data was read."""

    folder: Path
    num_bytes: int
    """About the size of the store; a build needs it twice."""
    free_bytes: int


AnnounceStore = Callable[[StoreEstimate | StorePlan | RowPlan], None]
"""A function that gets the estimate before the scan, and the exact size before the store is written."""


class StoreMaker:
    """The maker of the store of one build or refresh; one per rank."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        comm: Communicator,
        announce: AnnounceStore,
        progress: ProgressCallback | None,
        *,
        only_existing: bool = False,
    ) -> None:
        """Write nothing yet.

        Args:
            config: says whether there is a store, and where.
            tokenizer: counts the tokens of the index.
            comm: the ranks that share the work.
            announce: called on rank 0 with the size.
            progress: called on rank 0 while the store is written.
            only_existing: only a store that is there is written further.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._comm = comm
        self._announce = announce
        self._progress = progress
        self._only_existing = only_existing
        self._files = StoreFiles(store_folder(config, config.index.path))
        texts = [data_set.text for data_set in config.data.named_sets().values()]
        vocab_size = tokenizer.vocab_size if tokenizer is not None else 0
        dtype = token_type(vocab_size, has_chats=any(map(is_chat, texts)))
        self._spools = TokenSpools(self._files.spool, dtype, comm.rank)
        self.kept: KeptRows | None = None
        """The rows that the index has from before a refresh; known on rank 0."""
        self.tokens: StoreReport | None = None
        """The token store that was written, if any."""
        self.rows: RowReport | None = None
        """The row store that was written, if any."""

    def begin(self, plan: ScanPlan) -> None:
        """Decide on rank 0 what is written, before the scan starts.

        Raises:
            ConfigError: the disk has too little room for them.
        """
        plan.writes_rows = self._wants_rows(plan.shards)
        plan.keeps_tokens = self._wants_tokens(plan.shards)
        if not plan.keeps_tokens:
            return
        try:
            self._files.spool.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The token store cannot be written to {self._files.folder}: {os.strerror(error.errno or 0)}.\n"
                "  Set data.tokens to a writable folder, or data.materialize=never."
            ) from None
        # The log does not know what other jobs have left there.
        if not plan.done:
            self._spools.remove()
        self._check_room(plan)

    def spool_of(self, plan: ScanPlan, shard: Shard) -> TokenSpool | None:
        """Return the file of this thread for the token ids of a shard; None if they are not kept."""
        if not plan.keeps_tokens or load_format(shard.format).holds_tokens:
            return None
        return self._spools.of_thread(plan.attempt)

    def finish(self, plan: ScanPlan, records: UnitRecords | None) -> None:
        """Write the store, after the index has its final name; rank 0 gives the records. **Collective.**"""
        if plan.writes_rows or plan.keeps_tokens:
            # All ranks open the index, which rank 0 has just written.
            self._comm.Barrier()
        if plan.writes_rows:
            self.rows = write_rows(self._config, self._comm, self._announce, self._progress)
        if not plan.keeps_tokens:
            return
        results: list[SpooledResult] = []
        for unit in sorted(records or ()):
            headers = [record.header() for record in (records or {})[unit]]
            results += [SpooledResult(num_blocks=h.summary.blocks, tokens=h.spooled) for h in headers]
        sources = StoreSources(results=results, kept=self.kept)
        self.tokens = write_store(self._config, self._comm, self._announce, self._progress, sources)

    def _wants_rows(self, shards: Sequence[Shard]) -> bool:
        """Return whether the configuration and the data ask for a row store."""
        if self._config.data.materialize == "never":
            return False
        if self._only_existing:
            return RowStoreFiles.of_index(self._config.index.path).read_header() is not None
        return self._config.mixture.unit == "samples" and any(decodes_files(shard.format) for shard in shards)

    def _wants_tokens(self, shards: Sequence[Shard]) -> bool:
        """Return whether the configuration and the data ask for a token store."""
        data = self._config.data
        tokenizer = self._tokenizer
        if tokenizer is None or isinstance(tokenizer, StoredTokenIds) or self._config.mixture.unit != "tokens":
            return False
        if data.materialize == "never" or data.tokens == OFF:
            return False
        if self._only_existing:
            header = self._files.read_header()
            return header is not None and header.tokenizer == tokenizer.fingerprint
        text_shards = [shard for shard in shards if not load_format(shard.format).holds_tokens]
        if data.materialize == "always":
            return bool(text_shards)
        return any(decodes_files(shard.format) for shard in text_shards)

    def _check_room(self, plan: ScanPlan) -> None:
        """Announce how much will be written, and refuse what cannot fit."""
        done = set(plan.done)
        decoded = 0.0
        for number, (position, _, _) in enumerate(plan.units):
            shard = plan.shards[position]
            if number not in done and not load_format(shard.format).holds_tokens:
                decoded += plan.sizes[number] * expansion_of(shard.format, 0, shard.size_bytes)
        estimate = StoreEstimate(
            folder=self._files.folder,
            num_bytes=int(decoded / BYTES_PER_TOKEN * np.dtype(self._spools.dtype).itemsize),
            free_bytes=shutil.disk_usage(self._files.spool.parent).free,
        )
        self._announce(estimate)
        # Twice as much will be needed; the estimate may be wrong by a factor of two.
        if estimate.num_bytes > estimate.free_bytes:
            raise ConfigError(
                f"The token store needs about {2 * estimate.num_bytes / 1e9:,.3g} GB in {estimate.folder} while the "
                f"index is built, but {estimate.free_bytes / 1e9:,.3g} GB are free.\n"
                "  Make room, set data.tokens to a folder on another file system, or set data.materialize=never."
            )
