"""Train a small byte-level BPE tokenizer, for demos, tests and custom vocabularies."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mixtera_hpc.errors import ConfigError

__all__ = ["END_OF_TEXT", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"


def train_bpe(documents: Iterable[str], vocab_size: int, path: str | Path, special_tokens: Sequence[str] = ()) -> Path:
    """Train a tokenizer on `documents`, write it as a `tokenizer.json`, and return its path.

    The same documents give the same file.

    Args:
        documents: texts to train on.
        vocab_size: maximum number of tokens. 256 of them are bytes, and one ends a document. There are fewer if the
            documents have too few pairs to merge.
        path: of the file to write.
        special_tokens: more special tokens; their ids follow that of the end of a document, which is 0.

    Raises:
        ConfigError: `vocab_size` has no room for all bytes and special tokens.
    """
    # Heavy, and only training needs it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [END_OF_TEXT, *special_tokens]
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"The size of the vocabulary is {vocab_size}, but must be at least {smallest}: one token per byte, and "
            f"{', '.join(special_tokens)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _write_whole(Path(path), tokenizer.to_str(pretty=True))


def _write_whole(target: Path, content: str) -> Path:
    """Write a temporary file and rename it, so that no reader sees half a file; return the path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(target)
    return target
