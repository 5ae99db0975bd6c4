"""The files of a token store, and the check that a store belongs to an index.

A store is a folder with four kinds of files:

- `store.json`: what the store was made from, and whether it is complete
- `tokens.bin`: the token ids of all documents, without the special tokens that the configuration adds
- `starts-FINGERPRINT.bin`: position of the first token of every row, int64, in the order of the index
- `done-ATTEMPT-RANK.log`: the units that are written; removed when the store is complete

Documents with the same categorical values follow each other in index order, so that a domain is read in long runs. Rows
of shards that hold token ids, and rows that the build skipped, have no tokens here. The documents of shards that a
refresh adds are laid out in the same way, behind those that are there. Tokens of conversations have four bytes; the
highest bit is set for those that are not trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.scan.token_spool import SPOOL_FOLDER
from mixtera_hpc.index.shards import fingerprint_of_shard
from mixtera_hpc.index.store_folder import Count, StoreFolder, blocks_by_source

__all__ = ["StoreFiles", "StoreHeader", "StoredRows", "configured_stores", "store_folder", "token_type"]

VERSION = 2
AUTO = "auto"
OFF = "off"
CURE = "Run mixtera-hpc tokenize again with the same index and tokenizer, or set data.tokens=off."


class StoreHeader(msgspec.Struct, kw_only=True):
    """The content of `store.json`."""

    version: int = VERSION
    index: str
    """Fingerprint of the index."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: Annotated[str, msgspec.Meta(pattern="^<u[24]$")]
    """Type of the token ids: `<u2` or `<u4`."""
    chat_loss: str = ""
    """Value of `dataplane.chat_loss` that decided which tokens of conversations are trained; empty without any."""
    rows: Count
    """Rows of the index."""
    tokens: Count
    """Tokens in the file, those of shards that are not in the index any more included."""
    starts: Annotated[str, msgspec.Meta(pattern="^starts-[0-9a-f]+[.]bin$")]
    """Name of the file with the first token of every row."""
    kept_blocks: Count = 0
    """First blocks of the index whose tokens were there before the last refresh."""
    kept_tokens: Count = 0
    """Tokens that were there before the last refresh; the others are laid out behind them."""
    generations: list[str] = []
    """Fingerprints of earlier states of the index, whose rows come first in it."""
    complete: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the complete store."""
        return self.tokens * np.dtype(self.dtype).itemsize + 8 * self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """A checked store, and the rows of a run's indexes that it holds. Rank 0 sends it to every rank."""

    folder: str
    index: str
    """Fingerprint of the index."""
    dtype: str
    starts: str
    """Path of the file with the first token of every row."""
    tokens_digest: str
    """Digest of the size, and of the first and the last MiB, of the file of tokens."""
    first_block: int
    """Position of the first block of its index among the blocks of all joined indexes."""
    last_block: int
    """One past the last block."""


@dataclass(frozen=True, slots=True)
class StoreFiles(StoreFolder):
    """The paths of a token store."""

    @property
    def tokens(self) -> Path:
        """The file of all token ids."""
        return self.folder / "tokens.bin"

    def starts(self, header: StoreHeader) -> Path:
        """Return the file of the first token of every row."""
        return self.folder / header.starts

    @property
    def spool(self) -> Path:
        """The folder in which an index build keeps tokens until it knows their places."""
        return self.folder / SPOOL_FOLDER

    def read_header(self) -> StoreHeader | None:
        """Return the content of `store.json`; None if there is no such file.

        Raises:
            DataError: the file is damaged.
        """
        return self.decode_header(StoreHeader, "mixtera-hpc tokenize", "data.tokens=off")

    def tokens_digest(self) -> str:
        """Return the digest of the size, and of the first and the last MiB, of the file of tokens.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            return fingerprint_of_shard(self.tokens, self.tokens.stat().st_size)
        except OSError as error:
            raise DataError(
                f"{self.tokens} cannot be read: {error.strerror}.\n  Change its permissions, or set data.tokens=off."
            ) from None


def token_type(vocab_size: int, *, has_chats: bool) -> np.dtype[np.unsignedinteger]:
    """Return the type that holds every id below `vocab_size`, with the marks of conversations if there are any."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 and not has_chats else "<u4")


def store_folder(config: Config, index: str) -> Path:
    """Return the folder of the store of one index: `data.tokens`, or a folder beside the index."""
    return Path(f"{index}.tokens") if config.data.tokens == AUTO else Path(config.data.tokens)


def configured_stores(config: Config, index: PropertyIndex) -> list[StoredRows]:
    """Return the checked token stores of the indexes that a run reads; an index without one is tokenized on the fly.

    Raises:
        ConfigError: the store is missing though `data.tokens` names it, incomplete, or made from another generation of
            the index or with another tokenizer.
        DataError: the store is damaged.
    """
    if config.data.tokens == OFF or config.mixture.unit != "tokens" or index.tokenizer_fingerprint is None:
        return []
    num_sources = len(index.sample_sources())
    if config.data.tokens != AUTO and num_sources > 1:
        raise ConfigError(
            f"data.tokens is {config.data.tokens}, but the run reads {num_sources} indexes, each with its own store.\n"
            "  Set data.tokens=auto, which takes the store beside each index."
        )
    stores = []
    for source, first_block, last_block in blocks_by_source(index):
        files = StoreFiles(store_folder(config, source.path))
        header = _checked_header(config, files, source.fingerprint, index.tokenizer_fingerprint)
        if header is not None:
            stores.append(
                StoredRows(
                    folder=str(files.folder),
                    index=source.fingerprint,
                    dtype=header.dtype,
                    starts=str(files.starts(header)),
                    tokens_digest=files.tokens_digest(),
                    first_block=first_block,
                    last_block=last_block,
                )
            )
    return stores


def _checked_header(config: Config, files: StoreFiles, index: str, tokenizer: str) -> StoreHeader | None:
    """Return the header of a store, None if there is none; refuse a store that does not belong to the index."""
    header = files.read_header()
    if header is None:
        if config.data.tokens == AUTO:
            return None
        raise ConfigError(
            f"data.tokens is {files.folder}, which holds no token store.\n"
            f"  Make one with mixtera-hpc tokenize data.tokens={files.folder} and the keys of this run, or set "
            "data.tokens=auto."
        )
    problem = ""
    if header.version != VERSION:
        problem = f"has version {header.version} instead of {VERSION}"
    elif header.tokenizer != tokenizer:
        problem = f"was made with tokenizer {header.tokenizer[:12]}, but the index with {tokenizer[:12]}"
    elif index not in (header.index, *header.generations):
        problem = f"was made from index {header.index[:12]}, but the index is {index[:12]} now"
    elif not header.complete:
        problem = "is incomplete: mixtera-hpc tokenize was interrupted, or is still running"
    elif header.chat_loss == "all" and config.dataplane.chat_loss != "all":
        # The other way round, the marks are ignored.
        problem = f"was made with dataplane.chat_loss=all, but the run has {config.dataplane.chat_loss}"
    if problem:
        raise ConfigError(f"The token store {files.folder} {problem}.\n  {CURE}")
    sizes = {files.tokens: header.tokens * np.dtype(header.dtype).itemsize, files.starts(header): 8 * header.rows}
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(
                f"{path} must have {size} bytes: it was cut off or removed.\n  Remove {files.folder} and run "
                "mixtera-hpc tokenize again, or set data.tokens=off."
            )
    return header
