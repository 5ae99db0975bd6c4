"""The tokenizer protocol, and its implementations over two libraries.

`gigatoken` is used for every tokenizer that it supports. Hugging Face's `tokenizers` is used for the others, and to
check gigatoken's results. Special tokens are never added here: the data plane decides how documents end.

Price: about 3 µs per kB of text on one core, with gigatoken.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = [
    "GigatokenTokenizer",
    "HuggingFaceTokenizer",
    "StoredTokenIds",
    "Tokenizer",
    "check_same_encoding",
    "load_tokenizer",
    "load_vocabulary",
]

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The tokens of several documents, concatenated, and their offsets; shapes (num_tokens,) and (num_documents + 1,)."""

# Names of the end-of-document token, in order of preference.
_COMMON_EOS_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|eot_id|>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)


class Tokenizer(Protocol):
    """Convert text to token ids. Several threads may use one tokenizer at once."""

    vocab_size: int
    """The largest id plus one."""
    eos_id: int | None
    """Id of the token that ends a document; None if the vocabulary has no token that is known as such."""
    fingerprint: str
    """Digest of the tokenizer's file, in hexadecimal. Token counts are valid only for the tokenizer that made them."""

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the tokens of each document, without special tokens."""
        ...

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of tokens of each document; shape (len(documents),)."""
        ...

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        """Encode documents, without special tokens.

        Returns:
            The tokens of all documents, concatenated, and offsets of shape (len(documents) + 1,). The tokens of
            document i are `tokens[offsets[i]:offsets[i + 1]]`.
        """
        ...


_NO_TOKENS = np.zeros(0, np.uint32)


class GigatokenTokenizer:
    """`Tokenizer` over gigatoken. A call uses one thread and releases the GIL.

    Documents are encoded one by one. The library's own batches cost 0.1 to 0.4 ms before the first token, and are 10 %
    faster only from some thousand documents on.
    """

    def __init__(self, definition: bytes, eos_token: str | None = None) -> None:
        import gigatoken  # Heavy, and only this class needs it.

        self._tokenizer = gigatoken.Tokenizer.from_json(definition)
        self._encode = self._tokenizer.backend.encode
        self.vocab_size = int(self._tokenizer.vocab_size)
        self.eos_id = _eos_id(definition, eos_token)
        self.fingerprint = _fingerprint(definition)

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        return list(map(self._encode, documents))

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.fromiter(map(len, map(self._encode, documents)), np.int64, len(documents))

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        return _concatenate(self.encode_each(documents))


class HuggingFaceTokenizer:
    """`Tokenizer` over Hugging Face's `tokenizers`; about 50 times slower than gigatoken."""

    def __init__(self, definition: bytes, eos_token: str | None = None) -> None:
        import tokenizers  # Heavy, and only this class needs it.

        self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_id = _eos_id(definition, eos_token)
        self.fingerprint = _fingerprint(definition)

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.array([len(tokens) for tokens in self.encode_each(documents)], np.int64)

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        return _concatenate(self.encode_each(documents))


class StoredTokenIds:
    """The `Tokenizer` of shards that hold token ids: a vocabulary size and an end token. It refuses to encode."""

    def __init__(self, vocab_size: int, eos_id: int | None) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.fingerprint = _fingerprint(f"stored ids below {vocab_size}, {eos_id} ends a document".encode())

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self.encode_batch([document])[0] for document in documents]

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.diff(self.encode_batch(documents)[1])

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        raise ConfigError(
            "A shard holds text, but dataplane.vocab_size is set, which requires token ids in all shards.\n"
            "  Set dataplane.tokenizer instead, or exclude the shard with data.exclude."
        )


def _concatenate(tokens: Sequence[NDArray[np.uint32]]) -> Encoded:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(t) for t in tokens], out=offsets[1:])
    return np.concatenate([_NO_TOKENS, *tokens]), offsets


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: of a `tokenizer.json`, or of the folder that has one.
        eos_token: the token that ends a document. If None, it is taken from `tokenizer_config.json` in the same folder,
            or else it is the first of the common names that the vocabulary has.

    Raises:
        ConfigError: the file cannot be read, no library supports it, or it has no token `eos_token`.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        definition = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"dataplane.tokenizer is {str(path)!r}, which cannot be read: {error.strerror}.\n"
            "  Give the path of a Hugging Face tokenizer.json."
        ) from None
    eos_token = eos_token or _configured_eos(file.parent)
    try:
        return GigatokenTokenizer(definition, eos_token)
    except ConfigError:
        raise
    except Exception as first:
        return _load_with_huggingface(definition, eos_token, file, first)


def load_vocabulary(plane: DataPlaneConfig) -> Tokenizer | None:
    """Load the tokenizer `dataplane.tokenizer`, or describe stored ids by `dataplane.vocab_size`; None without both.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    if plane.tokenizer is not None:
        return load_tokenizer(Path(plane.tokenizer), plane.eos_token)
    if plane.vocab_size is not None:
        return StoredTokenIds(plane.vocab_size, plane.eos_id)
    return None


def check_same_encoding(a: Tokenizer, b: Tokenizer, documents: Sequence[str]) -> None:
    """Check that two tokenizers encode every one of `documents` equally.

    Raises:
        ConfigError: they differ; the message shows the first document that differs.
    """
    for document in documents:
        tokens_a, _ = a.encode_batch([document])
        tokens_b, _ = b.encode_batch([document])
        if not np.array_equal(tokens_a, tokens_b):
            raise ConfigError(
                f"{type(a).__name__} and {type(b).__name__} encode {document[:80]!r} differently: "
                f"{tokens_a[:16].tolist()} and {tokens_b[:16].tolist()}."
            )


def _load_with_huggingface(definition: bytes, eos_token: str | None, file: Path, first: Exception) -> Tokenizer:
    """Load a tokenizer that gigatoken refuses with the error `first`."""
    try:
        return HuggingFaceTokenizer(definition, eos_token)
    except ConfigError:
        raise
    except Exception as second:
        reason = str(second).strip().splitlines() or [str(first)]
        raise ConfigError(
            f"dataplane.tokenizer is {str(file)!r}, which is not a readable tokenizer.json: {reason[0]}.\n"
            "  Give the path of a Hugging Face tokenizer.json, or of the folder that has one."
        ) from None


def _fingerprint(definition: bytes) -> str:
    return hashlib.blake2b(definition, digest_size=16).hexdigest()


def _eos_id(definition: bytes, eos_token: str | None) -> int | None:
    """Return the id of `eos_token`; if None, that of the first common name that the vocabulary has."""
    tokens = _vocabulary(definition)
    if eos_token is None:
        return next((tokens[name] for name in _COMMON_EOS_TOKENS if name in tokens), None)
    if eos_token not in tokens:
        special = [name for name in tokens if name.startswith(("<", "[")) and name.endswith((">", "]"))]
        raise ConfigError(
            f"dataplane.eos_token is {eos_token!r}, but the tokenizer has no such token."
            f"{did_you_mean(eos_token, special)}"
        )
    return tokens[eos_token]


def _vocabulary(definition: bytes) -> dict[str, int]:
    """Return the ids of all tokens of a `tokenizer.json`, by their text."""
    content: dict[str, Any] = json.loads(definition)
    vocabulary = content.get("model", {}).get("vocab", {})
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids = {str(token): int(number) for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram models list [token, score] in the order of ids.
        ids = {str(entry[0]): position for position, entry in enumerate(vocabulary)}
    return ids | {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}


def _configured_eos(folder: Path) -> str | None:
    """Return `eos_token` of the Hugging Face `tokenizer_config.json` in `folder`; None if there is none."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict) and "content" in token:
        return str(token["content"])
    return None if token is None else str(token)
