"""A small corpus of Markov chains with known entropy rates, for experiments with mixtures that take seconds.

    python -m mixtera_hpc.testing.markov_corpus FOLDER

Each source has symbols of its own, so a model knows the source from the first symbol. Sources differ in what can be
learned:

- `noise`: independent uniform symbols. Only the set of symbols can be learned.
- `cycle`: the alphabet in its order. A model knows it after a few steps.
- `chain` and `branch`: every symbol has three successors of different probability. The two differ in nothing but
  their symbols and their amount of data, and their loss falls with every sequence of them that is served.

With equal weights of the held-out losses, the best mixture of a short run is therefore known: almost everything goes to
`chain` and `branch`, in equal parts. Natural proportions spend four fifths on the other two.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.tokens.bpe_training import train_bpe

__all__ = ["entropy_rates", "write_markov_corpus"]

ALPHABETS: Mapping[str, tuple[int, int]] = {"noise": (33, 4), "cycle": (37, 4), "chain": (41, 42), "branch": (83, 42)}
"""Source → code of its first symbol, and number of symbols. All are one byte of UTF-8, and so one token."""
SUCCESSORS = (0.7, 0.2, 0.1)
"""Probabilities of the successors in `chain` and `branch`."""
NUM_DOCUMENTS: Mapping[str, int] = {"noise": 1250, "cycle": 750, "chain": 350, "branch": 150}
DOCUMENT_SYMBOLS = 160
VOCAB_SIZE = 257
"""All bytes and the end of a document; nothing is merged."""


def write_markov_corpus(folder: Path) -> list[str]:
    """Write the corpus, a tokenizer and an index below `folder`; return the overrides that select them.

    The same call writes the same bytes.
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(0))
    sources = {name: iter(_documents(name, generator)) for name in NUM_DOCUMENTS}
    order = generator.permutation(np.repeat(list(NUM_DOCUMENTS), list(NUM_DOCUMENTS.values()))).tolist()
    with (data / "markov.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": next(sources[name]), "source": name}) + "\n" for name in order)
    train_bpe([], VOCAB_SIZE, folder / "tokenizer.json")

    overrides = [
        f"data.root={data.absolute()}",
        "data.properties.source=source",
        f"index.path={(folder / 'index.h5').absolute()}",
        f"dataplane.tokenizer={(folder / 'tokenizer.json').absolute()}",
        "mixture.group_by=[source]",
    ]
    build_index(compose(overrides))
    return overrides


def entropy_rates() -> dict[str, float]:
    """Return the entropy rate of every source, in nats per symbol; no model has a smaller loss inside a document."""
    probabilities = np.array(SUCCESSORS)
    branching = float(-(probabilities * np.log(probabilities)).sum())
    return {"noise": float(np.log(ALPHABETS["noise"][1])), "cycle": 0.0, "chain": branching, "branch": branching}


def _documents(name: str, generator: np.random.Generator) -> Iterator[str]:
    """Yield the documents of one source."""
    first, num_symbols = ALPHABETS[name]
    shape = (NUM_DOCUMENTS[name], DOCUMENT_SYMBOLS)
    if name == "noise":
        symbols = generator.integers(num_symbols, size=shape)
    elif name == "cycle":
        symbols = (generator.integers(num_symbols, size=(shape[0], 1)) + np.arange(shape[1])) % num_symbols
    else:
        symbols = _branching(num_symbols, shape, generator)
    for row in symbols.tolist():
        yield "".join(chr(first + symbol) for symbol in row)


def _branching(num_symbols: int, shape: tuple[int, int], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return chains of first order; shape `shape`."""
    # Permutations make every symbol equally frequent.
    successors = np.stack([generator.permutation(num_symbols) for _ in SUCCESSORS], axis=1)
    symbols = np.empty(shape, np.int64)
    symbols[:, 0] = generator.integers(num_symbols, size=shape[0])
    branch = generator.choice(len(SUCCESSORS), size=shape, p=SUCCESSORS)
    for place in range(1, shape[1]):
        symbols[:, place] = successors[symbols[:, place - 1], branch[:, place]]
    return symbols


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the corpus into the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m mixtera_hpc.testing.markov_corpus", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    write_markov_corpus(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
