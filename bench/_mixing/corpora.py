"""The corpora of `python -m bench mixing`, with everything of a run that does not depend on the mixture.

`synthetic` has four sources whose entropy rates are known. Each source has symbols of its own, so that a model knows
the source from the first symbol:

- `noise`: independent uniform symbols. Nothing can be learned but their frequencies.
- `trivial`: the alphabet in its order, from a random start. A model knows it after some steps.
- `early`: a chain of first order with four successors of each symbol. Its loss falls from the first steps on.
- `late`: in nine of ten cases, a symbol follows from the one two places before it. Single symbols and neighbours are
  uniform, so the loss stays at that of noise until attention has found the place.

`demo` is the corpus of `mixtera-hpc demo`: source files and documentation of the Python installation, seven kinds.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench._corpus import make_once
from mixtera_hpc.cli.demo_corpus import collect, write_corpus
from mixtera_hpc.tokens.bpe_training import train_bpe

__all__ = ["CORPORA", "Corpus"]

NUM_SYMBOLS = 20
"""Size of every alphabet."""
DOCUMENT_SYMBOLS = 400
FIRST_SYMBOL = {"noise": 33, "trivial": 56, "early": 79, "late": 102}
"""Code of the first character of the alphabet; all are printable, and none overlaps another."""
SUCCESSORS = (0.7, 0.1, 0.1, 0.1)
"""Probabilities of the successors in `early`."""
RULE_SHARE = 0.9
"""Share of the symbols in `late` that follow the rule."""
NUM_DOCUMENTS = {"noise": 1600, "trivial": 1200, "early": 960, "late": 240}
DEMO_VOCAB = 512
HELD_OUT = 0.05
"""Share of the samples that training never sees."""

Symbols = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A corpus on disk, and the settings that all runs on it share."""

    name: str
    overrides: tuple[str, ...]
    """Hydra overrides of data, index, model and budget."""
    domains: tuple[str, ...]
    """Values of the property that makes the domains, in the order of `domain_id`."""
    hand_set: Mapping[str, float]
    """The mixture that one would write by hand before any run."""
    num_steps: int
    unimax_epochs: float
    entropy: Mapping[str, float] | None = None
    """Nats per token that no model can get below, where they are known."""


def synthetic(folder: Path) -> Corpus:
    """Return the synthetic corpus; write it below `folder` unless it exists."""
    root = make_once(folder / "synthetic", _write_synthetic)
    return Corpus(
        name="synthetic",
        overrides=(
            f"data.root={root}",
            "data.include=[data.jsonl]",
            "data.properties.kind=kind",
            f"index.path={folder}/synthetic.h5",
            f"dataplane.tokenizer={root}/tokenizer.json",
            "dataplane.seq_len=32",
            "training.learning_rate=5e-3",
            *_common(),
        ),
        domains=("early", "late", "noise", "trivial"),
        # More of what can be learned, less of what is known to be noise or trivial.
        hand_set={"early": 0.4, "late": 0.4, "noise": 0.1, "trivial": 0.1},
        num_steps=500,
        unimax_epochs=0.75,
        entropy=entropies(),
    )


def demo(folder: Path) -> Corpus:
    """Return the corpus of `mixtera-hpc demo`; write it below `folder` unless it exists."""
    root = make_once(folder / "demo", _write_demo)
    return Corpus(
        name="demo",
        overrides=(
            "experiment=demo",
            f"data.root={root}/corpus",
            f"index.path={folder}/demo.h5",
            f"dataplane.tokenizer={root}/tokenizer.json",
            "dataplane.seq_len=32",
            "dataplane.audit=false",
            "training.learning_rate=4e-3",
            *_common(),
        ),
        domains=("documentation", "header", "license", "package", "stdlib", "stub", "test"),
        # The usual guess: prose and well-kept code up, boilerplate down.
        hand_set={
            "documentation": 0.2,
            "header": 0.1,
            "license": 0.05,
            "package": 0.3,
            "stdlib": 0.2,
            "stub": 0.05,
            "test": 0.1,
        },
        num_steps=800,
        # The budget is 4 % of the corpus; with this limit the smallest domain gets less than the others.
        unimax_epochs=0.08,
    )


CORPORA: Mapping[str, Callable[[Path], Corpus]] = {"synthetic": synthetic, "demo": demo}


def entropies() -> dict[str, float]:
    """Return the entropy rate of every synthetic source, nats per symbol."""
    others = (1 - RULE_SHARE) / NUM_SYMBOLS
    late = np.full(NUM_SYMBOLS, others)
    late[0] += RULE_SHARE
    return {
        "noise": float(np.log(NUM_SYMBOLS)),
        "trivial": 0.0,
        "early": _entropy(np.array(SUCCESSORS)),
        "late": _entropy(late),
    }


def _entropy(probabilities: NDArray[np.float64]) -> float:
    return float(-(probabilities * np.log(probabilities)).sum())


def _common() -> tuple[str, ...]:
    return (
        "mixture.group_by=[kind]",
        f"query.holdout.fraction={HELD_OUT}",
        "dataplane.global_batch_size=32",
        "dataplane.chunk_steps=4",
        "dataplane.workers=0",
        "dataplane.comm=local",
        "training.num_layers=1",
        "training.embedding_dim=64",
        "training.warmup_steps=20",
        "training.num_threads=1",
        "training.validate_steps=8",
        "training.validate_min_sequences=64",
        "checkpoint.every_steps=0",
    )


def _write_synthetic(folder: Path) -> None:
    """Write the documents of all sources in random order, and a tokenizer of bytes."""
    random = np.random.Generator(np.random.Philox(0))
    kinds = random.permutation(np.repeat(list(NUM_DOCUMENTS), list(NUM_DOCUMENTS.values())))
    sources = {kind: iter(_documents(kind, random)) for kind in NUM_DOCUMENTS}
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": next(sources[kind]), "kind": kind}) + "\n" for kind in kinds.tolist())
    # 256 bytes and the end of a document: no pair is merged, so a symbol is a token.
    train_bpe([], 257, folder / "tokenizer.json")


def _documents(kind: str, random: np.random.Generator) -> Iterator[str]:
    """Yield the documents of one source."""
    shape = (NUM_DOCUMENTS[kind], DOCUMENT_SYMBOLS)
    symbols = _GENERATORS[kind](shape, random)
    first = FIRST_SYMBOL[kind]
    for row in symbols.tolist():
        yield "".join(chr(first + symbol) for symbol in row)


def _noise(shape: tuple[int, int], random: np.random.Generator) -> Symbols:
    return random.integers(0, NUM_SYMBOLS, shape)


def _trivial(shape: tuple[int, int], random: np.random.Generator) -> Symbols:
    start = random.integers(0, NUM_SYMBOLS, (shape[0], 1))
    symbols: Symbols = (start + np.arange(shape[1])) % NUM_SYMBOLS
    return symbols


def _early(shape: tuple[int, int], random: np.random.Generator) -> Symbols:
    successors = np.stack([random.permutation(NUM_SYMBOLS)[: len(SUCCESSORS)] for _ in range(NUM_SYMBOLS)])
    symbols = random.integers(0, NUM_SYMBOLS, shape)
    choice = random.choice(len(SUCCESSORS), shape, p=SUCCESSORS)
    for place in range(1, shape[1]):
        symbols[:, place] = successors[symbols[:, place - 1], choice[:, place]]
    return symbols


def _late(shape: tuple[int, int], random: np.random.Generator) -> Symbols:
    symbols = random.integers(0, NUM_SYMBOLS, shape)
    follows = random.random(shape) < RULE_SHARE
    successor = random.permutation(NUM_SYMBOLS)
    for place in range(2, shape[1]):
        ruled = successor[symbols[:, place - 2]]
        symbols[:, place] = np.where(follows[:, place], ruled, symbols[:, place])
    return symbols


_GENERATORS: Mapping[str, Callable[[tuple[int, int], np.random.Generator], Symbols]] = {
    "noise": _noise,
    "trivial": _trivial,
    "early": _early,
    "late": _late,
}


def _write_demo(folder: Path) -> None:
    write_corpus(folder / "corpus", print)
    documents = (document.text for number, document in enumerate(collect()) if number % 8 == 0)
    train_bpe(documents, DEMO_VOCAB, folder / "tokenizer.json")
