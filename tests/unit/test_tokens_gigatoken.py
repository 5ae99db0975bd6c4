"""A tokenizer that gigatoken would read differently from Hugging Face's `tokenizers` is encoded by the latter."""

import copy
import itertools
import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers, trainers

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.tokenizers import DOCUMENTS
from mixtera_hpc.tokens import gigatoken_encode
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import EncodingSettings, GigatokenTokenizer, HuggingFaceTokenizer, load_tokenizer

Content = dict[str, Any]
LEARNED = [*DOCUMENTS[:40], *["  a\r\n\r\n\tc d's WE'LL 12345 e\u0301 café  _x_ don't!\n <0x0A> quick"] * 20]
PARTS = [
    *("<x>", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x00", "\x1d", "'s", "'LL", "’ll", "ſ"),
    *(
        "e",
        "é",
        "\u0301",
        "\u0338",
        "\u212b",
        "K",
        "İ",
        "ﬁ",
        "\u1100\u1161",
        "🙂",
        "\u200d",
        "👩",
        "漢字",
        "▁",
        "12345",
    ),
    *("fox", "Fox", "The", " no", "no.", "quick", "quixotic", "<s>", "</s>", "<|endoftext|>", "<0x41>", "_", "-", "!"),
    *("\ufeff", "\U0010ffff", "\u0378", "a"),
]
LONG = ["a" * 10_000, " " * 10_000, "ab \n" * 2_500, "é" * 3_000, "\u0301" * 500]


@cache
def texts() -> list[str]:
    """Return texts that libraries disagree about if they can."""
    source = random.Random(1)
    mixed = ["".join(source.choices(PARTS, k=source.randint(2, 30))) for _ in range(250)]
    return ["", *PARTS, *mixed, *LONG, *DOCUMENTS]


@cache
def byte_level(folder: Path) -> Content:
    content: Content = json.loads(train_bpe(LEARNED, 500, folder / "byte.json").read_text())
    return content


@cache
def byte_fallback() -> Content:
    """Return a tokenizer like that of Llama 2."""
    tokenizer = HfTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(LEARNED, trainer)
    content: Content = json.loads(tokenizer.to_str())
    return {**content, "added_tokens": content["added_tokens"][:3], "normalizer": LLAMA_2, "pre_tokenizer": None}


def _sequence(name: str, *steps: Content) -> Content:
    return {"type": "Sequence", name: list(steps)}


def _split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Content:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def _byte_level(**changes: Any) -> Content:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


def _split_first(*steps: Content, **changes: Any) -> Mapping[str, Any]:
    """Return the change to a pre-tokenizer that has ByteLevel as its last step."""
    last = _byte_level(**{"use_regex": False, **changes})
    return {"pre_tokenizer": _sequence("pretokenizers", *steps, last)}


def _replace(old: str, new: str) -> Content:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _metaspace(**changes: Any) -> Content:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True, **changes}


def _added(*texts: str, **flags: bool) -> Mapping[str, Any]:
    """Return the change that adds tokens, which are not special, behind the vocabulary."""
    return {"added": [{"content": text, **dict.fromkeys(FLAGS, False), **flags} for text in texts]}


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LLAMA_2 = _sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, _replace(" ", "▁"))
NFC = {"type": "NFC"}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")

FAST, SLOW, REFUSED = GigatokenTokenizer, HuggingFaceTokenizer, ConfigError
BYTE_LEVEL: dict[str, tuple[type, Mapping[str, Any]]] = {
    "GPT-2": (FAST, {}),
    "a space in front": (FAST, {"pre_tokenizer": _byte_level(add_prefix_space=True)}),
    "Llama 3": (FAST, _split_first(_split(LLAMA_3)) | {"model": {"ignore_merges": True}}),
    "Qwen": (FAST, _split_first(_split(QWEN)) | {"normalizer": NFC} | _added("<x>")),
    "cl100k": (FAST, _split_first(_split(LLAMA_3, "Removed", True))),
    "GPT-NeoX": (FAST, {"normalizer": NFC} | _added("   ", "  ", "|||EMAIL|||", normalized=True)),
    "no pre-tokenizer": (SLOW, {"pre_tokenizer": None}),
    "Whitespace": (SLOW, {"pre_tokenizer": {"type": "Whitespace"}}),
    "Whitespace first": (SLOW, _split_first({"type": "Whitespace"})),
    "digits first": (SLOW, _split_first({"type": "Digits", "individual_digits": True}, use_regex=True)),
    "digits before a known split": (SLOW, _split_first({"type": "Digits", "individual_digits": True}, _split(LLAMA_3))),
    "another split": (SLOW, _split_first(_split(r"\p{L}+|\s"))),
    "split by another behavior": (SLOW, _split_first(_split(LLAMA_3, "MergedWithPrevious"))),
    "matches removed": (SLOW, _split_first(_split(LLAMA_3, "Removed"))),
    "split twice": (SLOW, _split_first(_split(LLAMA_3), use_regex=True)),
    "split after a space in front": (SLOW, _split_first(_split(LLAMA_3), add_prefix_space=True)),
    "split without ByteLevel": (SLOW, {"pre_tokenizer": _split(LLAMA_3)}),
    "no split": (SLOW, {"pre_tokenizer": _byte_level(use_regex=False)}),
    "Metaspace": (SLOW, {"pre_tokenizer": _metaspace()}),
    "Lowercase": (SLOW, {"normalizer": {"type": "Lowercase"}}),
    "NFC and Lowercase": (SLOW, {"normalizer": _sequence("normalizers", NFC, {"type": "Lowercase"})}),
    "NFD": (SLOW, {"normalizer": {"type": "NFD"}}),
    "NFC and normalized tokens": (SLOW, {"normalizer": NFC} | _added("<x>", normalized=True)),
    "NFC and normalized letters": (SLOW, {"normalizer": NFC} | _added("fox", normalized=True)),
    "NFC and a normalized K": (SLOW, {"normalizer": NFC} | _added("K!", normalized=True)),
    "added tokens": (FAST, _added("<x>", "fox", "fox no", "  ", " \n")),
    "normalized tokens": (FAST, _added("<x>", "fox", normalized=True)),
    "tokens that take spaces before": (FAST, _added("<x>", lstrip=True)),
    "tokens that take spaces behind": (FAST, _added("<x>", rstrip=True)),
    "tokens that take spaces that are tokens": (SLOW, _added("<x>", " ", lstrip=True, rstrip=True)),
    "whole words": (SLOW, _added("fox", single_word=True)),
    "a token within a special one": (SLOW, _added("<|endo")),
    "a token over the end of a special one": (SLOW, _added(">fox", "|>F")),
    "a token with another id": (REFUSED, {"added": [{"id": 900, "content": "<x>", **dict.fromkeys(FLAGS, False)}]}),
    "ignored merges": (FAST, {"model": {"ignore_merges": True}, "vocab": ["Ġquixotic", "quixotic"]}),
    "a token without merges": (FAST, {"vocab": ["Ġquixotic"]}),
    "a token that is no bytes": (SLOW, {"model": {"ignore_merges": True}, "vocab": ["漢字"]}),
    "merges written as texts": (FAST, {"merges": lambda merges: [" ".join(merge) for merge in merges]}),
    "merges in another order": (FAST, {"merges": lambda merges: merges[::-1]}),
    "merges that occur twice": (SLOW, {"merges": lambda merges: merges + merges[:9]}),
    "a merge without its token": (REFUSED, {"merges": lambda merges: [*merges, ["q", "x"]]}),
    "an unknown token": (FAST, {"model": {"unk_token": "a", "fuse_unk": True}}),
    "a prefix of tokens": (REFUSED, {"model": {"continuing_subword_prefix": "##"}}),
    "a suffix of tokens": (SLOW, {"model": {"end_of_word_suffix": "</w>"}}),
    "byte fallback without bytes": (SLOW, {"model": {"byte_fallback": True}}),
    "dropout": (REFUSED, {"model": {"dropout": 0.1}}),
}
BYTE_FALLBACK: dict[str, tuple[type, Mapping[str, Any]]] = {
    "Llama 2": (FAST, _added("<x>", "fox")),
    "normalized tokens": (FAST, _added("<x>", "fox", normalized=True)),
    "tokens that take spaces": (FAST, _added("<x>", lstrip=True, rstrip=True)),
    "whole words": (SLOW, _added("fox", single_word=True)),
    "Metaspace": (FAST, {"normalizer": None, "pre_tokenizer": _metaspace()} | _added("<x>")),
    "Metaspace at first": (FAST, {"normalizer": None, "pre_tokenizer": _metaspace(prepend_scheme="first")}),
    "Metaspace without splits": (FAST, {"normalizer": None, "pre_tokenizer": _metaspace(split=False)}),
    "spaces kept": (FAST, {"normalizer": None}),
    "Strip": (
        FAST,
        {
            "normalizer": _sequence(
                "normalizers", {"type": "Strip", **dict.fromkeys(("strip_left", "strip_right"), True)}, LLAMA_2
            )
        },
    ),
    "NFKC": (SLOW, {"normalizer": _sequence("normalizers", {"type": "NFKC"}, LLAMA_2)}),
    "Whitespace": (SLOW, {"pre_tokenizer": {"type": "Whitespace"}}),
    "ignored merges": (SLOW, {"model": {"ignore_merges": True}, "vocab": ["▁quixotic"]}),
    "merges that occur twice": (SLOW, {"merges": lambda merges: merges + merges[:9]}),
    "a byte is missing": (SLOW, {"without": ["<0x00>", "<0xE6>"]}),
    "a byte is a character": (FAST, {"without": ["<0x21>"]}),
}


def _changed(content: Content, changes: Mapping[str, Any]) -> Content:
    """Return a changed copy of a `tokenizer.json`."""
    content = copy.deepcopy(content)
    content.update({key: value for key, value in changes.items() if key in ("normalizer", "pre_tokenizer")})
    model = content["model"]
    model.update(changes.get("model", {}))
    if "merges" in changes:
        model["merges"] = changes["merges"](model["merges"])
    for text in changes.get("without", ()):
        del model["vocab"][text]
    for text in changes.get("vocab", ()):
        model["vocab"][text] = max(model["vocab"].values()) + 1
    for number, token in enumerate(changes.get("added", ()), max(model["vocab"].values()) + 1):
        content["added_tokens"].append({"id": number, **token})
    return content


@pytest.mark.parametrize("allowed", ["text", "allow"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("byte level", name) for name in BYTE_LEVEL), *(("byte fallback", name) for name in BYTE_FALLBACK)],
)
def test_a_tokenizer_gives_the_ids_of_tokenizers_or_is_refused(
    kind: str,
    name: str,
    allowed: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = byte_level(tmp_path_factory.getbasetemp()) if kind == "byte level" else byte_fallback()
    library, changes = (BYTE_LEVEL if kind == "byte level" else BYTE_FALLBACK)[name]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(_changed(base, changes)))
    settings = EncodingSettings(special_tokens_in_text=allowed)
    if library is REFUSED:
        with pytest.raises(ConfigError):
            load_tokenizer(file, settings)
        return

    tokenizer = load_tokenizer(file, settings)
    overlaps = "special one" in name and allowed == "allow"
    assert type(tokenizer) is (FAST if overlaps else library)
    reference = HfTokenizer.from_file(str(file))
    reference.encode_special_tokens = allowed == "text"
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts()]
    for _ in range(2):
        assert [tokens.tolist() for tokens in tokenizer.encode_each(texts())] == expected
    with monkeypatch.context() as patch:
        patch.setattr(gigatoken_encode, "LONG_TEXT", 0)
        assert [tokens.tolist() for tokens in tokenizer.encode_each(texts())] == expected
    tokens, offsets = tokenizer.encode_batch(texts())
    assert [tokens[i:j].tolist() for i, j in itertools.pairwise(offsets)] == expected
    with pytest.raises((TypeError, UnicodeEncodeError)):
        tokenizer.encode_each(["a\ud800"])
