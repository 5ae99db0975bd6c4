"""Shards that hold token ids: what says which vocabulary they are of, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import run_problems
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.tokenizer import StoredTokenIds, load_vocabulary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, r"dataplane\.vocab_size is 0, expected 1 to"),
        ({"vocab_size": 1 << 31}, r"dataplane\.vocab_size is 2147483648"),
        ({"vocab_size": 10, "tokenizer": "t.json"}, "are both set"),
        ({"vocab_size": 10, "eos_id": 10}, r"dataplane\.eos_id is 10, expected an id below dataplane\.vocab_size=10"),
        ({"eos_id": 1, "tokenizer": "t.json"}, r"name its token with dataplane\.eos_token"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    config = compose(["data.root=/data", "mixture.unit=samples"])
    (problem,) = run_problems(replace(config, dataplane=replace(config.dataplane, **settings)))
    import re

    assert re.search(message, problem)


def test_the_same_size_and_end_are_the_same_vocabulary() -> None:
    assert StoredTokenIds(10, 3).fingerprint == StoredTokenIds(10, 3).fingerprint
    assert (
        len(
            {StoredTokenIds(10, 3).fingerprint, StoredTokenIds(11, 3).fingerprint, StoredTokenIds(10, None).fingerprint}
        )
        == 3
    )


def test_stored_ids_encode_nothing() -> None:
    for encode in (StoredTokenIds(10, 3).encode_batch, StoredTokenIds(10, 3).encode_each):
        with pytest.raises(ConfigError, match=r"Set dataplane\.tokenizer instead"):
            encode(["text"])


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Ten documents of ids below 50, of which every other ends with 7."""
    (tmp_path / "data").mkdir()
    rng = np.random.Generator(np.random.Philox(0))
    documents = [[*rng.integers(10, 50, 40).tolist(), *([7] if i % 2 else [])] for i in range(10)]
    write_megatron(tmp_path / "data" / "a.bin", [*documents, [], [7]])
    return [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]


def test_tokens_are_counted_without_the_ones_that_end_documents(words: list[str]) -> None:
    with_end = build_index(compose([*words, "dataplane.vocab_size=50", "dataplane.eos_id=7"]))
    without = build_index(compose([*words, "dataplane.vocab_size=50", "dataplane.add_eos=false"]))
    assert (with_end.tokens, without.tokens) == (400, 406)


def test_an_end_that_nobody_knows_cannot_be_added(words: list[str]) -> None:
    config = compose([*words, "dataplane.vocab_size=50"])
    assert load_vocabulary(config.dataplane) is not None
    build_index(config)
    with pytest.raises(ConfigError, match=r"Set dataplane\.eos_token \(dataplane\.eos_id with dataplane\.vocab_size\)"):
        open_source(config, Local())


def test_an_index_of_another_vocabulary_is_refused(words: list[str]) -> None:
    build_index(compose([*words, "dataplane.vocab_size=50", "dataplane.eos_id=7"]))
    with pytest.raises(PropertyIndexError, match=r"but dataplane\.vocab_size=60 is"):
        open_source(compose([*words, "dataplane.vocab_size=60", "dataplane.eos_id=7"]), Local())
