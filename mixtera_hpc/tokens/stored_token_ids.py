"""The tokenizer of shards that hold token ids, which encodes nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.tokens.chat_template import ChatTemplate
from mixtera_hpc.tokens.definition import AddedTokens, fingerprint
from mixtera_hpc.tokens.joined_texts import Encoded, EncodedDocuments
from mixtera_hpc.tokens.token_memory import TokenMemory

__all__ = ["StoredTokenIds"]


class StoredTokenIds:
    """The `Tokenizer` of shards that hold token ids: a vocabulary size and an end token. It refuses to encode."""

    def __init__(self, vocab_size: int, eos_id: int | None, *, add_eos: bool = True) -> None:
        self.vocab_size = vocab_size
        self.bos_ids: tuple[int, ...] = ()
        self.eos_id = eos_id
        self.added = AddedTokens(after=(eos_id,) if add_eos and eos_id is not None else ())
        self.chat: ChatTemplate | None = None
        self.fingerprint = fingerprint(f"stored ids below {vocab_size}, {eos_id} ends a document".encode())

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self.encode_batch([document])[0] for document in documents]

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.diff(self.encode_batch(documents)[1])

    def decode(self, tokens: NDArray[np.integer[Any]]) -> str:
        return str(tokens.tolist())

    def encode_documents(self, documents: Sequence[str], memory: TokenMemory | None = None) -> EncodedDocuments:
        tokens, offsets = self.encode_batch(documents)
        return EncodedDocuments(tokens, offsets[:-1], np.diff(offsets))

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        raise ConfigError(
            "A shard holds text, but dataplane.vocab_size is set, which requires token ids in all shards.\n"
            "  Set dataplane.tokenizer instead, or exclude the shard with data.exclude."
        )
