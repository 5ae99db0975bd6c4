"""Decide which tokenizers gigatoken encodes exactly like Hugging Face's `tokenizers`.

gigatoken ignores parts of a `tokenizer.json` that it does not implement, and then encodes texts differently. So it gets
only files whose every part is known to mean the same to both libraries: byte-level BPE with a known way to split texts,
and BPE with byte fallback whose spaces are written as "▁". Price: 0.2 s for a vocabulary with 280,000 merges.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

__all__ = ["check_gigatoken_reads"]

Part = Mapping[str, Any]

_PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_CHARACTERS = {*map(chr, _PRINTABLE_BYTES), *map(chr, range(256, 512 - len(_PRINTABLE_BYTES)))}
"""The characters that stand for the 256 bytes in the tokens of a byte-level BPE."""
_NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that no text contains."""


def check_gigatoken_reads(content: Part, added: Sequence[Part]) -> None:
    """Raise ValueError, which names the part, if gigatoken may encode texts differently from `tokenizers`.

    Args:
        content: the `tokenizer.json`.
        added: those of its added tokens that gigatoken gets.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError("its model is no BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its tokens have prefixes or suffixes")
    _check_merges(model)
    _check_added_tokens(content, added)
    if model.get("byte_fallback"):
        _check_byte_fallback(content)
    else:
        _check_byte_level(content, added)


def _check_merges(model: Part) -> None:
    """Raise ValueError if an id or a merge occurs twice, or a merge needs a token that the vocabulary lacks."""
    vocabulary = model["vocab"]
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two of its tokens have one id")
    # Old files write "a b" instead of ["a", "b"].
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    if len(set(merges)) < len(merges):
        raise ValueError("a merge occurs twice")
    if not vocabulary.keys() >= {*chain.from_iterable(merges), *map("".join, merges)}:
        raise ValueError("a merge needs a token that is not in the vocabulary")


def _check_added_tokens(content: Part, added: Sequence[Part]) -> None:
    """Raise ValueError for ids, flags and texts of added tokens that the two libraries treat differently."""
    vocabulary = content["model"]["vocab"]
    every = content.get("added_tokens") or []
    # `tokenizers` gives consecutive ids to those that the vocabulary lacks, whatever the file says.
    largest = len(vocabulary) - 1
    for token in every:
        expected = vocabulary.get(token["content"], largest + 1)
        if token["id"] != expected:
            raise ValueError("an added token has another id than its position gives it")
        largest = max(largest, expected)

    if any(token.get("single_word") for token in added):
        raise ValueError("an added token is matched as a whole word only")
    texts = [token["content"] for token in added]
    strips = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if strips and any(text != text.strip() for text in texts):
        raise ValueError("added tokens take white space from each other")
    # `tokenizers` finds special tokens, too, where they stay text, and does not look for others inside of them.
    hidden = "\0".join(["", *(token["content"] for token in every if token not in added), ""])
    for text in texts:
        beginnings = (text[:length] + "\0" for length in range(1, len(text)))
        if text in hidden or any(beginning in hidden for beginning in beginnings):
            raise ValueError("an added token overlaps with a special token")


def _check_byte_level(content: Part, added: Sequence[Part]) -> None:
    """Raise ValueError for a byte-level BPE of which gigatoken ignores a part."""
    model = content["model"]
    others = model["vocab"].keys() - {token["content"] for token in content.get("added_tokens") or []}
    if not _BYTE_CHARACTERS.issuperset("".join(others)):
        raise ValueError("its vocabulary has tokens that are not written in byte characters")
    normalizers = list(_steps(content.get("normalizer"), "normalizers"))
    if any(step["type"] != "NFC" for step in normalizers):
        raise ValueError("it normalizes texts otherwise than by NFC")
    if normalizers and any(token.get("normalized") and _changes_with_nfc(token["content"]) for token in added):
        raise ValueError("an added token is searched in normalized text")

    *splits, last = [*_steps(content.get("pre_tokenizer"), "pretokenizers")] or [{}]
    if last.get("type") != "ByteLevel":
        raise ValueError("its pre-tokenizer does not end with ByteLevel")
    # Without other steps, ByteLevel splits texts by itself. gigatoken does not split twice.
    if last.get("use_regex", True) == bool(splits) or (splits and last.get("add_prefix_space", True)):
        raise ValueError("its pre-tokenizer splits texts in an unknown way")
    if not all(_isolates_matches(step, len(splits)) for step in splits):
        raise ValueError("its pre-tokenizer splits texts in an unknown way")


def _changes_with_nfc(text: str) -> bool:
    """Return True if NFC can make or remove an occurrence of a text.

    NFC makes K, ; and ` of other characters, and composes letters and <, = and > with a mark that follows.
    """
    return (
        not text.isascii() or any(character in text for character in "K;`") or text[-1].isalpha() or text[-1] in "<=>"
    )


def _isolates_matches(step: Part, num_splits: int) -> bool:
    """Return True if a step splits texts at the matches of a regular expression, and loses nothing.

    gigatoken accepts only expressions that it knows. Alone, each of them matches every character.
    """
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        return False
    how = (step["behavior"], step.get("invert", False))
    return how == ("Isolated", False) or (num_splits == 1 and how == ("Removed", True))


def _check_byte_fallback(content: Part) -> None:
    """Raise ValueError for a BPE with byte fallback of which gigatoken ignores a part."""
    model = content["model"]
    vocabulary = model["vocab"]
    if model.get("ignore_merges"):
        raise ValueError("its merges are ignored")
    for byte in set(range(256)) - _NOT_IN_UTF8:
        if f"<0x{byte:02X}>" not in vocabulary and not (byte < 128 and chr(byte) in vocabulary):
            raise ValueError("its vocabulary lacks a byte")
    # gigatoken itself refuses everything else that it does not know, for this kind of model.
    known = ("Prepend", "Replace", "Strip")
    if any(step["type"] not in known for step in _steps(content.get("normalizer"), "normalizers")):
        raise ValueError("it normalizes texts in an unknown way")


def _steps(part: Part | None, name: str) -> Iterator[Part]:
    """Yield the steps of a normalizer or pre-tokenizer, those of nested sequences in their order."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[name]:
            yield from _steps(inner, name)
    else:
        yield part
