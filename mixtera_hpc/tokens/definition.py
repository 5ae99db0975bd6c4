"""A parsed `tokenizer.json`: its vocabulary, its special tokens, and what it adds to a text.

The post-processor of a tokenizer adds tokens before and after every text (Llama's `<s>`). The libraries are asked for
texts without them; the data plane adds them to every document itself, so that it knows how long a document is.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["AddedTokens", "TokenizerDefinition", "fingerprint", "read_definition"]

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

_CONVERSION = (
    "  Convert it once, with the package transformers, and give the new folder:\n"
    '  python -c "from transformers import AutoTokenizer; '
    "AutoTokenizer.from_pretrained('{folder}').save_pretrained('NEW')\""
)


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """The token ids that a post-processor adds to a single text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def inside(self, outer: "AddedTokens") -> "AddedTokens":
        """Return the tokens that two post-processors add of which `outer` comes second."""
        return AddedTokens(outer.before + self.before, self.after + outer.after)


@dataclass(frozen=True)
class TokenizerDefinition:
    """The content of a `tokenizer.json`, and the names of tokens in the `tokenizer_config.json` beside it."""

    raw: bytes
    """The file."""
    content: Mapping[str, Any]
    """The file, parsed."""
    bos_token: str | None = None
    """The `bos_token` of `tokenizer_config.json`."""
    eos_token: str | None = None
    """The `eos_token` of `tokenizer_config.json`."""
    chat_template: str | None = None
    """The template of `chat_template.jinja`, else of `tokenizer_config.json`."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """All special tokens that `tokenizer_config.json` names, by name: `bos_token`, `pad_token`, …."""

    @classmethod
    def of(cls, raw: bytes) -> "TokenizerDefinition":
        """Parse the bytes of a `tokenizer.json`.

        Raises:
            ConfigError: the tokenizer is random: its results would differ from run to run.
            ValueError: the bytes are not the JSON of a tokenizer.
        """
        content = parse_json(raw)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError("it has no `model`")
        dropout = content["model"].get("dropout")
        if dropout:
            raise ConfigError(
                f'The tokenizer has "dropout": {dropout}, so that it encodes a text differently every time.\n'
                '  Set "dropout": null in a copy of the tokenizer.json, and use the copy.'
            )
        return cls(raw=raw, content=content)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, by their text."""
        vocabulary = self.content["model"].get("vocab", {})
        ids: dict[str, int] = {}
        if isinstance(vocabulary, dict):
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):  # Unigram models list [token, score] in the order of ids.
            ids = {str(entry[0]): position for position, entry in enumerate(vocabulary)}
        return ids | {str(token["content"]): int(token["id"]) for token in self.content.get("added_tokens") or []}

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.vocabulary.values(), default=-1) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by their text."""
        added = self.content.get("added_tokens") or []
        return {str(token["content"]): int(token["id"]) for token in added if token.get("special")}

    @property
    def unknown_id(self) -> int | None:
        """Id of the token that stands for text outside the vocabulary; None if there is none."""
        model = self.content["model"]
        if "unk_id" in model:  # Unigram models give the id itself.
            return None if model["unk_id"] is None else int(model["unk_id"])
        return self.vocabulary.get(str(model.get("unk_token")))

    def without_special_tokens(self) -> dict[str, Any]:
        """Return the content of a file that encodes the texts of special tokens like any other text."""
        added = [token for token in self.content.get("added_tokens") or [] if not token.get("special")]
        # The post-processor refers to special tokens, and is never asked for.
        return {**self.content, "added_tokens": added, "post_processor": None}

    @cached_property
    def added(self) -> AddedTokens:
        """The tokens that the post-processor adds to a text.

        Raises:
            ConfigError: the post-processor is of an unknown type.
        """
        return _added_by(self.content.get("post_processor"), self.vocabulary)

    def check_added_ids(self, id_of: Callable[[str], int | None]) -> None:
        """Raise ConfigError if `id_of`, which is that of a library, gives an added token another id than the file."""
        for token in self.content.get("added_tokens") or []:
            text, number = token["content"], id_of(token["content"])
            if number != token["id"]:
                raise ConfigError(
                    f"The tokenizer.json gives the added token {text!r} the id {token['id']}, but Hugging Face's "
                    f"library encodes it as {number}.\n"
                    "  In a copy of the file, list added tokens by ascending ids, without gaps after the vocabulary."
                )

    def added_to_documents(self, eos_id: int | None, *, add_bos: bool | None, add_eos: bool) -> AddedTokens:
        """Return what is added to every document: what the settings ask for, else what the post-processor adds.

        Raises:
            ConfigError: no file names the token that begins a document, or the post-processor adds other tokens at its
                end.
        """
        before = self.added.before
        if add_bos is not None:
            before = self.bos_ids if add_bos else ()
        if add_bos and not before:
            raise ConfigError(
                "dataplane.add_bos is true, but neither the tokenizer's post-processor nor bos_token in a "
                "tokenizer_config.json beside it says which token begins a document.\n"
                "  Name it in tokenizer_config.json, or set dataplane.add_bos=null."
            )

        after = (eos_id,) if add_eos and eos_id is not None else ()
        if add_eos and self.added.after and self.added.after != after:
            names = {number: text for text, number in self.vocabulary.items()}
            texts = [names.get(number, str(number)) for number in self.added.after]
            raise ConfigError(
                f"The tokenizer's post-processor adds {' '.join(texts)} to the end of a text, but the token that ends "
                f"a document is {names.get(eos_id or 0) if eos_id is not None else 'unknown'}.\n"
                f"  Set dataplane.eos_token={texts[-1]!r}, or dataplane.add_eos=false to add nothing."
            )
        return AddedTokens(before, after)

    def eos_id(self, eos_token: str | None) -> int | None:
        """Return the id of the token that ends a document; None if no token is known as such.

        Args:
            eos_token: its text. If None, it is the `eos_token` of `tokenizer_config.json`, else the token that the
                post-processor adds at the end, else the first of the common names that the vocabulary has.

        Raises:
            ConfigError: the vocabulary has no such token.
        """
        name = eos_token or self.eos_token
        if name is not None:
            return self._id_of("eos_token", name)
        if len(self.added.after) == 1:
            return self.added.after[0]
        return next((self.vocabulary[name] for name in _COMMON_EOS_TOKENS if name in self.vocabulary), None)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The token that begins a document, in `tokenizer_config.json` or by the post-processor; empty if unknown."""
        if self.added.before or self.bos_token is None:
            return self.added.before
        return (self._id_of("bos_token", self.bos_token),)

    def _id_of(self, key: str, token: str) -> int:
        if token not in self.vocabulary:
            similar = [name for name in self.vocabulary if name.startswith(("<", "[")) and name.endswith((">", "]"))]
            raise ConfigError(
                f"dataplane.{key} is {token!r}, but the tokenizer has no such token.{did_you_mean(token, similar)}"
            )
        return self.vocabulary[token]


def read_definition(path: str | Path) -> tuple[Path, TokenizerDefinition]:
    """Read a `tokenizer.json`, or that of a folder, and the `tokenizer_config.json` beside it.

    Raises:
        ConfigError: the file cannot be read or parsed, or holds a tokenizer of another kind.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    _check_kind(Path(path), file)
    try:
        definition = TokenizerDefinition.of(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"dataplane.tokenizer is {str(path)!r}, which cannot be read: {error.strerror}.\n"
            "  Give the path of a Hugging Face tokenizer.json, or of the folder that has one."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"dataplane.tokenizer is {str(file)!r}, which is not a readable tokenizer.json: {error}.\n"
            "  Give the path of a Hugging Face tokenizer.json, or of the folder that has one."
        ) from None
    settings = file.with_name("tokenizer_config.json")
    configured = _configuration(settings)
    names = _configured_names(settings, configured)
    return file, replace(
        definition,
        bos_token=names["bos_token"],
        eos_token=names["eos_token"],
        chat_template=_chat_template(settings, configured),
        named_tokens=_named_tokens(configured),
    )


def _check_kind(given: Path, file: Path) -> None:
    """Raise ConfigError for a SentencePiece model or a tiktoken file, or a folder with nothing else."""
    others = [given] if given.is_file() else []
    if given.is_dir() and not file.exists():
        others = sorted(path for path in given.iterdir() if path.suffix in (".model", ".tiktoken"))
    for other in others:
        if other.suffix in (".model", ".tiktoken"):
            kind = "a SentencePiece model" if other.suffix == ".model" else "a tiktoken file"
            raise ConfigError(
                f"dataplane.tokenizer is {str(given)!r}, which holds {kind} and no tokenizer.json.\n"
                + _CONVERSION.format(folder=other.parent)
            )


def _configuration(file: Path) -> dict[str, Any]:
    """Return the content of a `tokenizer_config.json`; nothing if there is no such file.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    try:
        content = parse_json(file.read_bytes())
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}.\n  Correct the file, or remove it.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object.\n  Correct the file, or remove it.")
    return content


def _named_tokens(content: Mapping[str, Any]) -> dict[str, str]:
    """Return all special tokens that a `tokenizer_config.json` names."""
    entries = {key: value for key, value in content.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in entries.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _chat_template(file: Path, content: Mapping[str, Any]) -> str | None:
    """Return the chat template beside or inside a `tokenizer_config.json`; None without one.

    Raises:
        ConfigError: there are several templates, and none is the default.
    """
    own_file = file.with_name("chat_template.jinja")
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = content.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise ConfigError(
                f"{file} has several chat templates ({', '.join(named)}), but none is named default.\n"
                f"  Write the one to use into {own_file}."
            )
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"chat_template in {file} is {type(template).__name__}, but must be text.\n  Correct it.")
    return template


def _configured_names(file: Path, content: Mapping[str, Any]) -> dict[str, str | None]:
    """Return `bos_token` and `eos_token` of a `tokenizer_config.json`; None for those that it does not name.

    Raises:
        ConfigError: the file names a token by something that is not text.
    """
    names: dict[str, str | None] = {"bos_token": None, "eos_token": None}
    for key in names:
        token = content.get(key)
        # The form of an added token: {"content": "</s>", "lstrip": false, …}.
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            token = token["content"]
        if token is not None and not isinstance(token, str):
            raise ConfigError(
                f"{key} in {file} is {token!r}, but must be the text of one token.\n"
                f"  Correct the file{', or set dataplane.eos_token' if key == 'eos_token' else ''}."
            )
        names[key] = token
    return names


def _added_by(processor: Any, vocabulary: Mapping[str, int]) -> AddedTokens:
    """Return what a post-processor adds to a single text."""
    if processor is None:
        return AddedTokens()
    kind = processor.get("type")
    if kind not in _POST_PROCESSORS:
        raise ConfigError(
            f"The tokenizer has a post-processor of the unknown type {kind!r}, so that it cannot be said which tokens "
            f"it adds to a text.\n  Known types: {', '.join(_POST_PROCESSORS)}. Remove it from a copy of the file."
        )
    return _POST_PROCESSORS[kind](processor, vocabulary)


def _added_by_template(processor: Any, vocabulary: Mapping[str, int]) -> AddedTokens:
    ids = {name: tuple(entry["ids"]) for name, entry in (processor.get("special_tokens") or {}).items()}
    parts = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in processor["single"]]
    text = parts.index(None)
    before = [number for name in parts[:text] for number in ids[name]]
    after = [number for name in parts[text + 1 :] for number in ids[name]]
    return AddedTokens(tuple(before), tuple(after))


def _added_by_pair(processor: Any, vocabulary: Mapping[str, int]) -> AddedTokens:
    return AddedTokens((int(processor["cls"][1]),), (int(processor["sep"][1]),))


def _added_by_sequence(processor: Any, vocabulary: Mapping[str, int]) -> AddedTokens:
    added = AddedTokens()
    for inner in processor["processors"]:
        added = added.inside(_added_by(inner, vocabulary))
    return added


_POST_PROCESSORS: dict[str, Callable[[Any, Mapping[str, int]], AddedTokens]] = {
    "ByteLevel": lambda processor, vocabulary: AddedTokens(),
    "TemplateProcessing": _added_by_template,
    "BertProcessing": _added_by_pair,
    "RobertaProcessing": _added_by_pair,
    "Sequence": _added_by_sequence,
}
"""Type of a post-processor → what it adds."""


def fingerprint(*parts: bytes) -> str:
    """Return a digest of some bytes, in hexadecimal."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()
