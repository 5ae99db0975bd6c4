"""A small byte-level BPE, trained on the spot: for demos, tests and tokenizers of one's own."""

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["END_OF_TEXT", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"


def train_bpe(documents: Iterable[str], vocab_size: int, path: str | Path) -> Path:
    """Train on `documents` and write a `tokenizer.json`; the same documents give the same file.

    Args:
        vocab_size: at most this many tokens, of which 256 are bytes and one ends a text; fewer when the documents hold no
            more pairs.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {len(alphabet) + 1}: every byte and {END_OF_TEXT}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    part.replace(target)
    return target
