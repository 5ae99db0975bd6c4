"""Errors about documents whose tokens are not those that the index counted."""

from pathlib import Path

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["no_tokenizer_error", "range_outside_error", "token_count_error"]


def no_tokenizer_error() -> DataError:
    """Return the error for a request for tokens in a run without a tokenizer."""
    return DataError("Tokens were asked for without a tokenizer.\n  Set dataplane.tokenizer, or mixture.unit=samples.")


def token_count_error(source: Source, documents: Documents, position: int, num_tokens: int) -> DataError:
    """Return the error for a document with `num_tokens` tokens, which the index does not have."""
    blocks = source.blocks
    block = int(documents.block[position])
    shard = source.index.shard_paths[int(blocks.shard[block])]
    row = int(blocks.first_row[block]) + int(documents.row[position])
    return DataError(
        f"{shard} row {row} has {num_tokens} tokens, but the index counted {int(documents.size[position])}: "
        "the file or the tokenizer has changed.\n  Run mixtera-hpc index verify, and build the index again."
    )


def range_outside_error(source: Source, documents: Documents) -> DataError:
    """Return the error for documents of which some lie outside their shards."""
    block = int(documents.block[0])
    path = Path(source.index.data_root) / source.index.shard_paths[int(source.blocks.shard[block])]
    return shard_changed_error(path, BlockRef.of(source.blocks, block), "documents lie outside the file")
