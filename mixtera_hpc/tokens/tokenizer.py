"""One protocol over tokenizers, and the two libraries behind it.

`gigatoken` does the work; Hugging Face's `tokenizers` reads what it cannot, and checks it. Neither adds special tokens here:
where a document ends is the data plane's decision. Price: some 3 µs per kB and core.
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

_USUAL_EOS = (
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
    """Text → token ids. May be used by several threads at once."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int | None
    """The token that ends a document; None when the vocabulary has none that is known as such."""
    fingerprint: str
    """Hex digest of the tokenizer's file: token counts of one are worth nothing for another."""

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode documents, adding no special tokens; the tokens of each."""
        ...

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        """How many tokens `encode_each` finds in every document; shape (len(documents),)."""
        ...

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        """Encode documents, adding no special tokens.

        Returns:
            The tokens of all documents in a row, and offsets of shape (len(documents) + 1,): document i has
            `tokens[offsets[i]:offsets[i + 1]]`.
        """
        ...


_NO_TOKENS = np.zeros(0, np.uint32)


class GigatokenTokenizer:
    """`Tokenizer` over gigatoken; one thread per call, the GIL released.

    One call per document: the library's own batches cost 0.1 to 0.4 ms before the first token, and win back a tenth only from
    some thousand documents on.
    """

    def __init__(self, definition: bytes, eos_token: str | None = None) -> None:
        import gigatoken

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
        return _joined(self.encode_each(documents))


class HuggingFaceTokenizer:
    """`Tokenizer` over Hugging Face's `tokenizers`, some fifty times slower."""

    def __init__(self, definition: bytes, eos_token: str | None = None) -> None:
        import tokenizers

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
        return _joined(self.encode_each(documents))


class StoredTokenIds:
    """Stands in for a `Tokenizer` where all shards hold token ids already: it knows the vocabulary and encodes nothing."""

    def __init__(self, vocab_size: int, eos_id: int | None) -> None:
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.fingerprint = _fingerprint(f"stored ids below {vocab_size}, {eos_id} ends a document".encode())

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self.encode_batch([document])[0] for document in documents]

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.diff(self.encode_batch(documents)[1])

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        raise ConfigError(
            "A shard holds texts, but dataplane.vocab_size says that all of them hold token ids.\n"
            "  Set dataplane.tokenizer instead, or leave the shard out with data.exclude."
        )


def _joined(tokens: Sequence[NDArray[np.uint32]]) -> Encoded:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(t) for t in tokens], out=offsets[1:])
    return np.concatenate([_NO_TOKENS, *tokens]), offsets


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder that has one.

    Args:
        eos_token: the token that ends a document; found in `tokenizer_config.json` beside it, or among the usual names,
            when None.

    Raises:
        ConfigError: there is no such file, no library can read it, or it has no token `eos_token`.
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
        return _fallback(definition, eos_token, file, first)


def load_vocabulary(plane: DataPlaneConfig) -> Tokenizer | None:
    """The tokenizer that `dataplane.tokenizer` names, or what `dataplane.vocab_size` says of stored ids; None without both.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    if plane.tokenizer is not None:
        return load_tokenizer(Path(plane.tokenizer), plane.eos_token)
    return StoredTokenIds(plane.vocab_size, plane.eos_id) if plane.vocab_size is not None else None


def check_same_encoding(a: Tokenizer, b: Tokenizer, documents: Sequence[str]) -> None:
    """Compare two tokenizers on `documents`.

    Raises:
        ConfigError: they differ; names the first document on which they do.
    """
    for document in documents:
        left, right = a.encode_batch([document])[0], b.encode_batch([document])[0]
        if not np.array_equal(left, right):
            raise ConfigError(
                f"{type(a).__name__} and {type(b).__name__} encode {document[:80]!r} differently: "
                f"{left[:16].tolist()} and {right[:16].tolist()}."
            )


def _fallback(definition: bytes, eos_token: str | None, file: Path, first: Exception) -> Tokenizer:
    try:
        return HuggingFaceTokenizer(definition, eos_token)
    except ConfigError:
        raise
    except Exception as second:
        reason = str(second).strip().splitlines() or [str(first)]
        raise ConfigError(
            f"dataplane.tokenizer is {str(file)!r}, which is no tokenizer.json that can be read: {reason[0]}.\n"
            "  Name a tokenizer.json of Hugging Face's tokenizers, or the folder that has one."
        ) from None


def _fingerprint(definition: bytes) -> str:
    return hashlib.blake2b(definition, digest_size=16).hexdigest()


def _eos_id(definition: bytes, eos_token: str | None) -> int | None:
    """The id of `eos_token`, or of the first of the usual ones that the vocabulary has."""
    tokens = _vocabulary(definition)
    if eos_token is None:
        return next((tokens[name] for name in _USUAL_EOS if name in tokens), None)
    if eos_token not in tokens:
        special = [name for name in tokens if name.startswith(("<", "[")) and name.endswith((">", "]"))]
        raise ConfigError(
            f"dataplane.eos_token is {eos_token!r}, which the tokenizer does not have.{did_you_mean(eos_token, special)}"
        )
    return tokens[eos_token]


def _vocabulary(definition: bytes) -> dict[str, int]:
    content: dict[str, Any] = json.loads(definition)
    vocabulary = content.get("model", {}).get("vocab", {})
    found = {str(k): int(v) for k, v in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    if isinstance(vocabulary, list):
        found = {str(entry[0]): position for position, entry in enumerate(vocabulary)}
    return found | {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}


def _configured_eos(folder: Path) -> str | None:
    """The end-of-text token that Hugging Face's `tokenizer_config.json` names."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return str(token["content"]) if isinstance(token, dict) and "content" in token else token
