"""The tokens of rendered conversations, each with the mark whether it is trained.

The special tokens of a chat template are encoded as such. The library `tokenizers` says which characters a token
stands for; gigatoken does not. Price: about 150 µs per kB of text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.tokens.chat_template import ChatText

__all__ = ["NOT_TRAINED", "encode_chats"]

NOT_TRAINED = np.uint32(1 << 31)
"""The bit of a token that is not trained. Token ids have at most 31 bits."""
_NO_CHARACTER = np.iinfo(np.int64).max


def encode_chats(tokenizer: Any, chats: Sequence[ChatText]) -> list[NDArray[np.uint32]]:
    """Return the tokens of each conversation; those that are not trained have the bit `NOT_TRAINED`.

    Args:
        tokenizer: a tokenizer of the library `tokenizers`, without truncation and padding.
        chats: the rendered conversations.
    """
    encodings = tokenizer.encode_batch([str(chat) for chat in chats], add_special_tokens=False)
    return [_marked(encoding, chat) for encoding, chat in zip(encodings, chats, strict=True)]


def _marked(encoding: Any, chat: ChatText) -> NDArray[np.uint32]:
    tokens = np.array(encoding.ids, np.uint32)
    if chat.trained is None:
        return tokens
    characters = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    spans = np.array([*chat.trained, (_NO_CHARACTER, _NO_CHARACTER)], np.int64)
    # A token is trained if it has a character in common with an answer: with the first one that ends behind its start.
    span = spans[np.searchsorted(spans[:, 1], characters[:, 0], side="right")]
    is_trained = characters[:, 1] > span[:, 0]
    return np.where(is_trained, tokens, tokens | NOT_TRAINED)
