"""Loops that a builder or reader of JSON lines cannot beat: decode every row, or tokenize every text."""

import functools
from pathlib import Path
from typing import Any

import msgspec

from bench._corpus import make_tokenizer
from bench._figures import rate
from mixtera_hpc.tokens.tokenizer import load_tokenizer

__all__ = ["TEXT_ROW", "decode_in_order", "tokenizer_rate"]

TEXT_ROW = msgspec.defstruct("TextRow", [("text", str)], gc=False)
TOKENIZED_AT_ONCE = 256


def decode_in_order(shard: Path, decoder: "msgspec.json.Decoder[Any]") -> int:
    """Decode all rows in file order; return their number."""
    rows = 0
    with shard.open("rb") as file:
        for line in file:
            decoder.decode(line)
            rows += 1
    return rows


def tokenizer_rate(data: Path) -> float:
    """Return rows per second of a fresh tokenizer that does nothing else, over all shards in turn."""
    tokenizer = load_tokenizer(make_tokenizer())
    decoder = msgspec.json.Decoder(TEXT_ROW)
    rows = 0
    seconds = 0.0
    for shard in sorted(data.iterdir()):
        texts = [row.text for row in decoder.decode_lines(shard.read_bytes())]
        seconds += len(texts) / rate(functools.partial(_tokenize, tokenizer, texts))
        rows += len(texts)
    return rows / seconds


def _tokenize(tokenizer: Any, texts: list[str]) -> int:
    """Encode all texts, some hundred at a time; return their number."""
    groups = (texts[i : i + TOKENIZED_AT_ONCE] for i in range(0, len(texts), TOKENIZED_AT_ONCE))
    return sum(len(tokenizer.encode_each(group)) for group in groups)
