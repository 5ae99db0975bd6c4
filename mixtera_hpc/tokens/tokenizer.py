"""The tokenizer protocol, and its implementations over two libraries.

`gigatoken` is used for every tokenizer that it supports. Hugging Face's `tokenizers` is used for the others, and to
check gigatoken's results. A library encodes texts only. `Tokenizer.added` has the special tokens that begin and end a
document, and `encode_documents` adds them.

Price: about 3 to 5 µs per kB of text on one core, with gigatoken.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from operator import contains
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.tokens.chat_template import ChatTemplate, ChatText
from mixtera_hpc.tokens.chat_tokens import encode_chats
from mixtera_hpc.tokens.definition import AddedTokens, TokenizerDefinition, fingerprint, read_definition
from mixtera_hpc.tokens.gigatoken_encode import gigatoken_encode
from mixtera_hpc.tokens.gigatoken_support import check_gigatoken_reads
from mixtera_hpc.tokens.joined_texts import (
    BORDER,
    CannotJoin,
    Encode,
    Encoded,
    EncodedDocuments,
    JoinedTexts,
    with_border,
)
from mixtera_hpc.tokens.stored_token_ids import StoredTokenIds
from mixtera_hpc.tokens.token_memory import TokenMemory

__all__ = [
    "EncodingSettings",
    "GigatokenTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "check_same_encoding",
    "load_tokenizer",
    "load_vocabulary",
]


class Tokenizer(Protocol):
    """Convert text to token ids. Several threads may use one tokenizer at once."""

    vocab_size: int
    """The largest id plus one."""
    bos_ids: tuple[int, ...]
    """Ids of the tokens that begin a document; empty if no tokens are known as such."""
    eos_id: int | None
    """Id of the token that ends a document; None if the vocabulary has no token that is known as such."""
    added: AddedTokens
    """Tokens that the data plane adds to every document."""
    fingerprint: str
    """Digest of everything that token counts depend on, in hexadecimal; without the chat template."""
    chat: ChatTemplate | None
    """The chat template of the tokenizer's folder."""

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the tokens of each document, without `added`; those of a `ChatText` as `encode_chat` does."""
        ...

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of tokens of each document; shape (len(documents),)."""
        ...

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        """Encode documents, without `added`.

        Returns:
            The tokens of all documents, concatenated, and offsets of shape (len(documents) + 1,). The tokens of
            document i are `tokens[offsets[i]:offsets[i + 1]]`.
        """
        ...

    def encode_documents(self, documents: Sequence[str], memory: TokenMemory | None = None) -> EncodedDocuments:
        """Append the tokens of documents to `memory`, with `added` at both ends of each one that is not a `ChatText`.

        Without `memory`, they are written to new memory.
        """
        ...

    def decode(self, tokens: NDArray[np.integer[Any]]) -> str:
        """Return the text of tokens, special tokens included; for people, not for hot paths."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSettings:
    """The keys of `dataplane` that decide how a document is encoded; the same names and defaults."""

    eos_token: str | None = None
    add_bos: bool | None = None
    add_eos: bool = True
    special_tokens_in_text: Literal["text", "allow"] = "text"
    chat_loss: Literal["assistant", "all"] = "assistant"

    @classmethod
    def of(cls, plane: DataPlaneConfig) -> "EncodingSettings":
        """Take the settings from the configuration."""
        return cls(
            eos_token=plane.eos_token,
            add_bos=plane.add_bos,
            add_eos=plane.add_eos,
            special_tokens_in_text=plane.special_tokens_in_text,
            chat_loss=plane.chat_loss,
        )


TEXTS_PER_CALL = 256
"""Texts that Hugging Face's library encodes in one call, whose results take about 100 bytes per token."""
_NO_TOKENS = np.zeros(0, np.uint32)
_DEFAULTS = EncodingSettings()


class _LibraryTokenizer(ABC):
    """The part of a `Tokenizer` that does not depend on the library."""

    def __init__(self, definition: bytes | TokenizerDefinition, settings: EncodingSettings) -> None:
        if isinstance(definition, bytes):
            definition = TokenizerDefinition.of(definition)
        self._definition = definition
        self._settings = settings
        self.vocab_size = definition.vocab_size
        self.eos_id = definition.eos_id(settings.eos_token)
        self.added = definition.added_to_documents(self.eos_id, add_bos=settings.add_bos, add_eos=settings.add_eos)
        self.bos_ids = self.added.before or definition.added.before
        # An index holds counts of tokens: with other settings they would be wrong. `add_eos` changes none of them.
        names = f"{settings.special_tokens_in_text} {self.added.before}".encode()
        self.fingerprint = fingerprint(definition.raw, names)
        self.chat = _chat_template(definition, settings)

    @abstractmethod
    def _encode_texts(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the tokens of each text."""

    def encode_each(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        if ChatText not in set(map(type, documents)):
            return self._encode_texts(documents)
        texts = iter(self._encode_texts([text for text in documents if not isinstance(text, ChatText)]))
        chats = iter(encode_chats(self._decoder, [text for text in documents if isinstance(text, ChatText)]))
        return [next(chats if isinstance(text, ChatText) else texts) for text in documents]

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        return np.fromiter(map(len, self.encode_each(documents)), np.int64, len(documents))

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        return _concatenate(self.encode_each(documents))

    def encode_documents(self, documents: Sequence[str], memory: TokenMemory | None = None) -> EncodedDocuments:
        memory = memory or TokenMemory()
        each = self.encode_each(documents)
        # A chat template writes all special tokens itself.
        is_chat = [isinstance(document, ChatText) for document in documents]
        parts: list[Any] = [_NO_TOKENS] * (3 * len(each))
        for offset, added in ((0, self.added.before), (2, self.added.after)):
            tokens = np.array(added, np.uint32)
            parts[offset::3] = [_NO_TOKENS if chat else tokens for chat in is_chat]
        parts[1::3] = each
        stops = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))[2::3]
        starts = np.append(0, stops)[:-1]
        first = memory.append(np.frombuffer(b"".join(parts), np.uint32))
        return EncodedDocuments(memory.tokens, starts + first, stops - starts)

    def decode(self, tokens: NDArray[np.integer[Any]]) -> str:
        return str(self._decoder.decode(tokens.tolist(), skip_special_tokens=False))

    @cached_property
    def _decoder(self) -> Any:
        import tokenizers  # Heavy, and only decoding needs it.

        tokenizer = tokenizers.Tokenizer.from_buffer(self._definition.raw)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _check_special_tokens_stay_text(self) -> None:
        """Raise ConfigError if the model itself encodes the text of a special token as this token.

        Unigram models do that when special tokens are pieces of the vocabulary.
        """
        if self._settings.special_tokens_in_text == "allow":
            return
        special = self._definition.special_tokens
        # Its text may be unknown to the model, like any other.
        texts = [text for text, number in special.items() if number != self._definition.unknown_id]
        for text, ids in zip(texts, self.encode_each(texts), strict=True):
            if special[text] in ids:
                raise ConfigError(
                    f"dataplane.special_tokens_in_text is text, but the model of this tokenizer encodes the text "
                    f"{text!r} as its special token {special[text]}.\n"
                    "  Set dataplane.special_tokens_in_text=allow; text in the data can then end a document."
                )


class GigatokenTokenizer(_LibraryTokenizer):
    """`Tokenizer` over gigatoken.

    A call uses one thread. It holds the GIL for 2 to 5 ms per megabyte, if the text is short; see `gigatoken_encode`.
    """

    def __init__(self, definition: bytes | TokenizerDefinition, settings: EncodingSettings = _DEFAULTS) -> None:
        """Load a tokenizer; raise ValueError or an error of the library if it would not be encoded exactly."""
        super().__init__(definition, settings)
        check_gigatoken_reads(self._definition.content, self._content.get("added_tokens") or [])
        bordered = with_border(self._content, self.vocab_size)
        self._encode = gigatoken_encode(bordered or self._content)
        joined = JoinedTexts(self._encode, self.vocab_size, self.added)
        self._joined = joined if bordered and joined.agrees() else None
        self._check_special_tokens_stay_text()

    def count_each(self, documents: Sequence[str]) -> NDArray[np.int64]:
        if (joined := self._joined_for(documents)) is not None:
            with suppress(CannotJoin):
                return joined.count(documents)
        return super().count_each(documents)

    def encode_batch(self, documents: Sequence[str]) -> Encoded:
        if (joined := self._joined_for(documents)) is not None:
            with suppress(CannotJoin):
                tokens, counts = joined.encode_batch(documents)
                return tokens, np.append(0, np.cumsum(counts))
        return super().encode_batch(documents)

    def encode_documents(self, documents: Sequence[str], memory: TokenMemory | None = None) -> EncodedDocuments:
        memory = memory or TokenMemory()
        if (joined := self._joined_for(documents)) is not None:
            with suppress(CannotJoin):
                return joined.encode(documents, memory)
        return super().encode_documents(documents, memory)

    def _joined_for(self, documents: Sequence[str]) -> JoinedTexts | None:
        """Return the encoder of several documents in one call; None if these documents cannot be joined."""
        return self._joined if len(documents) > 1 and ChatText not in set(map(type, documents)) else None

    def _encode_texts(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        has_border = any(map(contains, documents, repeat(BORDER)))
        return list(map(self._encode_any if has_border else self._encode, documents))

    @cached_property
    def _encode_any(self) -> Encode:
        """The function that encodes texts which may contain the text of a border. It is hardly ever needed."""
        return gigatoken_encode(self._content)

    @property
    def _content(self) -> Mapping[str, Any]:
        """The content of the `tokenizer.json` that the library gets."""
        is_allowed = self._settings.special_tokens_in_text == "allow"
        return self._definition.content if is_allowed else self._definition.without_special_tokens()


class HuggingFaceTokenizer(_LibraryTokenizer):
    """`Tokenizer` over Hugging Face's `tokenizers`; about 50 times slower than gigatoken."""

    def __init__(
        self,
        definition: bytes | TokenizerDefinition,
        settings: EncodingSettings = _DEFAULTS,
        *,
        slow_because: str | None = None,
    ) -> None:
        """Load a tokenizer, which gigatoken does not encode for the reason `slow_because`."""
        import tokenizers  # Heavy, and only this class needs it.

        self.slow_because = slow_because

        super().__init__(definition, settings)
        self._tokenizer = tokenizers.Tokenizer.from_buffer(self._definition.raw)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = settings.special_tokens_in_text == "text"
        self._definition.check_added_ids(self._tokenizer.token_to_id)
        self._check_special_tokens_stay_text()

    def _encode_texts(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        tokens: list[NDArray[np.uint32]] = []
        for first in range(0, len(documents), TEXTS_PER_CALL):
            texts = list(documents[first : first + TEXTS_PER_CALL])
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            tokens += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return tokens


def _concatenate(tokens: Sequence[NDArray[np.uint32]]) -> Encoded:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(t) for t in tokens], out=offsets[1:])
    return np.concatenate([_NO_TOKENS, *tokens]), offsets


def load_tokenizer(path: str | Path, settings: EncodingSettings = _DEFAULTS) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: of a `tokenizer.json`, or of the folder that has one. The `tokenizer_config.json` beside it names the
            tokens that begin and end a document.
        settings: how documents are encoded.

    Raises:
        ConfigError: the file cannot be read, no library supports it, or the settings do not fit it.
    """
    file, definition = read_definition(path)
    try:
        return GigatokenTokenizer(definition, settings)
    except BaseException as first:
        if not _is_refusal(first):
            raise
        return _load_with_huggingface(definition, settings, file, first)


def load_vocabulary(plane: DataPlaneConfig) -> Tokenizer | None:
    """Load the tokenizer `dataplane.tokenizer`, or describe stored ids by `dataplane.vocab_size`; None without both.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    if plane.tokenizer is not None:
        return load_tokenizer(Path(plane.tokenizer), EncodingSettings.of(plane))
    if plane.vocab_size is not None:
        return StoredTokenIds(plane.vocab_size, plane.eos_id, add_eos=plane.add_eos)
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


def _load_with_huggingface(
    definition: TokenizerDefinition, settings: EncodingSettings, file: Path, first: BaseException
) -> Tokenizer:
    """Load a tokenizer that gigatoken refuses with the error `first`."""
    try:
        return HuggingFaceTokenizer(definition, settings, slow_because=_first_line(first))
    except BaseException as second:
        if not _is_refusal(second):
            raise
        reason = _first_line(second) or _first_line(first)
        raise ConfigError(
            f"dataplane.tokenizer is {str(file)!r}, which is not a readable tokenizer.json: {reason}.\n"
            "  Give the path of a Hugging Face tokenizer.json, or of the folder that has one."
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _is_refusal(error: BaseException) -> bool:
    """Return True if a library cannot read a file; False for errors of the settings, and for interrupts."""
    # Rust code that panics raises no Exception.
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or (isinstance(error, Exception) and not isinstance(error, ConfigError))


def _chat_template(definition: TokenizerDefinition, settings: EncodingSettings) -> ChatTemplate | None:
    if definition.chat_template is None:
        return None
    allows_special = settings.special_tokens_in_text == "allow"
    return ChatTemplate(
        source=definition.chat_template,
        special_tokens=definition.named_tokens,
        refused=() if allows_special else tuple(definition.special_tokens),
        loss=settings.chat_loss,
    )
