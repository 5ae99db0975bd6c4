"""Loops that a builder or reader of JSON lines cannot beat: decode every row, or tokenize every text."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench._corpus import make_tokenizer
from bench._figures import rate
from mixtera_hpc.tokens.tokenizer import load_tokenizer

__all__ = ["TEXT_ROW", "decode_in_order", "decode_shuffled", "shuffled_rows", "tokenize", "tokenizer_rate"]

TEXT_ROW = msgspec.defstruct("TextRow", [("text", str)], gc=False)
TOKENIZED_AT_ONCE = 256
ROWS_HELD = 1000


def decode_in_order(shard: Path, decoder: "msgspec.json.Decoder[Any]") -> int:
    """Decode all rows in file order; return their number."""
    rows = 0
    with shard.open("rb") as file:
        for line in file:
            decoder.decode(line)
            rows += 1
    return rows


def shuffled_rows(shard: Path) -> list[tuple[int, int]]:
    """Return (offset, length) of every row, shuffled.

    Each thousand rows are in the order of the disk, as our reader reads them.
    """
    lengths = np.array([len(line) for line in shard.read_bytes().splitlines(keepends=True)])
    offsets = np.cumsum(lengths) - lengths
    permutation = np.random.Generator(np.random.Philox(0)).permutation(len(lengths))
    groups = [np.sort(permutation[i : i + ROWS_HELD]) for i in range(0, len(permutation), ROWS_HELD)]
    order = np.concatenate(groups)
    return list(zip(offsets[order].tolist(), lengths[order].tolist(), strict=True))


def decode_shuffled(shard: Path, places: list[tuple[int, int]], decoder: "msgspec.json.Decoder[Any]") -> int:
    """Decode the rows at `places` with one positioned read each, and hold a thousand at a time; return their number."""
    rows: list[Any] = []
    with shard.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        for first in range(0, len(places), ROWS_HELD):
            group = places[first : first + ROWS_HELD]
            rows = [decoder.decode(os.pread(descriptor, length, offset)) for offset, length in group]
    return len(places) if rows else 0


def tokenizer_rate(data: Path) -> float:
    """Return rows per second of a fresh tokenizer that does nothing else, over all shards in turn."""
    tokenizer = load_tokenizer(make_tokenizer())
    decoder = msgspec.json.Decoder(TEXT_ROW)
    rows = 0
    seconds = 0.0
    for shard in sorted(data.iterdir()):
        texts = [row.text for row in decoder.decode_lines(shard.read_bytes())]
        seconds += len(texts) / rate(functools.partial(tokenize, tokenizer, texts, len))
        rows += len(texts)
    return rows / seconds


def tokenize(tokenizer: Any, texts: list[str], size: Callable[[list[Any]], int]) -> int:
    """Encode all texts, some hundred at a time; `size` says what is counted of the results."""
    groups = (texts[i : i + TOKENIZED_AT_ONCE] for i in range(0, len(texts), TOKENIZED_AT_ONCE))
    return sum(size(tokenizer.encode_each(group)) for group in groups)
