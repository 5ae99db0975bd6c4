"""Train a tokenizer on a sample of the selected documents, and print what it was trained on."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.cli.console import open_console
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.text_sample import sample_texts
from mixtera_hpc.errors import ConfigError, DataError, pluralize
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_tokenizer

__all__ = ["train_tokenizer"]

MAX_COMPARED_BYTES = 1_000_000
"""Text that is encoded with the new tokenizer, to print how many bytes a token has."""


class _Sample:
    """The documents to train on, counted while they are read."""

    def __init__(self, config: Config, max_bytes: int) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self.bytes_of_domain: Counter[str] = Counter()
        self.num_documents = 0
        self.first_texts: list[str] = []
        """The first documents, of about `MAX_COMPARED_BYTES` in total."""

    @property
    def num_bytes(self) -> int:
        return self.bytes_of_domain.total()

    def __iter__(self) -> Iterator[str]:
        for document in sample_texts(self._config, self._max_bytes):
            if self.num_bytes < MAX_COMPARED_BYTES:
                self.first_texts.append(document.text)
            self.bytes_of_domain[document.domain] += len(document.text.encode())
            self.num_documents += 1
            yield document.text


def train_tokenizer(args: argparse.Namespace) -> None:
    """Read the sample, write the `tokenizer.json`, and print a summary.

    Raises:
        ConfigError: a number or the output path cannot be used.
        DataError: the selected documents have no text.
    """
    out: Path = args.out
    if args.sample_mb <= 0:
        raise ConfigError(f"--sample-mb is {args.sample_mb:g}, but must be above 0.")
    if out.suffix != ".json":
        raise ConfigError(f"--out is {str(out)!r}, but must end in .json, e.g. --out tokenizer.json.")
    if out.exists():
        raise ConfigError(f"--out is {str(out)!r}, which exists.\n  Choose another path, or remove the file.")

    sample = _Sample(compose_data(args.overrides), round(args.sample_mb * 1e6))
    # In memory: the library iterates in threads of its own, in which reading must not happen.
    texts = list(sample)
    if not sample.num_bytes:
        raise DataError("The selected documents have no text.\n  Run mixtera-hpc query to see what is selected.")
    train_bpe(texts, args.vocab_size, out, args.special_token)
    _print_summary(out, sample, args.vocab_size)


def _print_summary(out: Path, sample: _Sample, vocab_size: int) -> None:
    tokenizer = load_tokenizer(out)
    num_tokens = int(tokenizer.count_each(sample.first_texts).sum())
    num_compared = sum(len(text.encode()) for text in sample.first_texts)

    console = open_console()
    documents = pluralize(sample.num_documents, "document")
    console.print(f"Trained on {documents} with {sample.num_bytes:,} bytes of text:")
    for domain, num_bytes in sample.bytes_of_domain.most_common():
        console.print(f"  {domain}  {num_bytes / sample.num_bytes:.1%}")
    console.print(f"{out}: {tokenizer.vocab_size:,} tokens, {num_compared / num_tokens:.2f} bytes per token")
    if tokenizer.vocab_size < vocab_size:
        console.print(f"  fewer tokens than --vocab-size={vocab_size:,}: the sample has no more pairs to merge")
    console.print(f"Next: mixtera-hpc index build … dataplane.tokenizer={out}")
