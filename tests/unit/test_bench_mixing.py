"""The corpora and mixtures of `python -m bench mixing`: entropies are what is written, and every mixture is valid."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench._mixing.corpora import CORPORA, NUM_SYMBOLS, Corpus
from bench._mixing.mixtures import MIXTURES, proposed
from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import compose


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return CORPORA["synthetic"](tmp_path_factory.mktemp("bench"))


def texts_of(corpus: Corpus, kind: str) -> list[str]:
    root = next(word.partition("=")[2] for word in corpus.overrides if word.startswith("data.root="))
    rows = map(json.loads, (Path(root) / "data.jsonl").read_text().splitlines())
    return [row["text"] for row in rows if row["kind"] == kind]


def entropy(counts: Counter[str]) -> float:
    shares = np.array(list(counts.values())) / counts.total()
    return float(-(shares * np.log(shares)).sum())


def conditional_entropy(texts: list[str], distance: int) -> float:
    """Return the entropy of a symbol, given the one `distance` places before it; nats."""
    pairs = Counter(a + b for text in texts for a, b in zip(text, text[distance:], strict=False))
    firsts = Counter(a for text in texts for a in text[:-distance])
    return entropy(pairs) - entropy(firsts)


def test_sources_have_the_entropies_of_the_table(corpus: Corpus) -> None:
    assert corpus.entropy is not None
    distance = {"noise": 1, "trivial": 1, "early": 1, "late": 2}
    for kind, places in distance.items():
        measured = conditional_entropy(texts_of(corpus, kind), places)
        assert measured == pytest.approx(corpus.entropy[kind], abs=0.02), kind
    assert len({symbol for kind in distance for text in texts_of(corpus, kind) for symbol in text}) == 4 * NUM_SYMBOLS


def test_neighbours_tell_nothing_about_the_late_source(corpus: Corpus) -> None:
    texts = texts_of(corpus, "late")
    assert conditional_entropy(texts, 1) == pytest.approx(np.log(NUM_SYMBOLS), abs=0.02)
    assert Counter(b == a for text in texts for a, b in pairwise(text))[True] > 0


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: mixture.name)
def test_every_mixture_is_a_valid_run(corpus: Corpus, mixture: object) -> None:
    words = [*corpus.overrides, *mixture.overrides(corpus)]  # type: ignore[attr-defined]
    if mixture.needs_reference:  # type: ignore[attr-defined]
        words.append("+mixture.algorithm.from_run=runs/uniform")
    check_run(compose([*words, f"training.num_steps={corpus.num_steps}"]))


def test_a_proposed_mixture_is_read(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    domains = "".join(f"- {{key: {{kind: {kind}}}, weight: 0.25}}\n" for kind in corpus.domains)
    path.write_text(f"kind: static\ndomains:\n{domains}")
    weights = [d.weight for d in compose([*corpus.overrides, *proposed(path).overrides(corpus)]).mixture.domains]
    assert weights == [0.25] * 4
    path.write_text("kind: natural\n")
    with pytest.raises(SystemExit, match="holds no domains"):
        proposed(path)
