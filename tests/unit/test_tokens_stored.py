"""Shards that hold token ids: the configured vocabulary, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import run_problems
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.stored_token_ids import StoredTokenIds
from mixtera_hpc.tokens.tokenizer import load_vocabulary


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
def test_an_invalid_vocabulary_is_refused(settings: dict[str, object], message: str) -> None:
    config = compose(["data.root=/data", "mixture.unit=samples"])
    (problem,) = run_problems(replace(config, dataplane=replace(config.dataplane, **settings)))
    assert re.search(message, problem)


def test_the_fingerprint_depends_on_the_size_and_the_end_token_only() -> None:
    assert StoredTokenIds(10, 3).fingerprint == StoredTokenIds(10, 3).fingerprint
    vocabularies = [StoredTokenIds(10, 3), StoredTokenIds(11, 3), StoredTokenIds(10, None)]
    assert len({vocabulary.fingerprint for vocabulary in vocabularies}) == 3


def test_stored_token_ids_refuse_to_encode() -> None:
    for encode in (StoredTokenIds(10, 3).encode_batch, StoredTokenIds(10, 3).encode_each):
        with pytest.raises(ConfigError, match=r"Set dataplane\.tokenizer instead"):
            encode(["text"])


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return overrides for a file of ten documents of ids below 50, of which every second one ends with 7."""
    (tmp_path / "data").mkdir()
    rng = np.random.Generator(np.random.Philox(0))
    documents = [[*rng.integers(10, 50, 40).tolist(), *([7] if i % 2 else [])] for i in range(10)]
    write_megatron(tmp_path / "data" / "a.bin", [*documents, [], [7]])
    return [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]


def test_the_token_count_excludes_end_tokens(overrides: list[str]) -> None:
    with_end = build_index(compose([*overrides, "dataplane.vocab_size=50", "dataplane.eos_id=7"]))
    without = build_index(compose([*overrides, "dataplane.vocab_size=50", "dataplane.add_eos=false"]))
    assert (with_end.tokens, without.tokens) == (400, 406)


def test_an_unknown_end_token_cannot_be_added(overrides: list[str]) -> None:
    config = compose([*overrides, "dataplane.vocab_size=50"])
    assert load_vocabulary(config.dataplane) is not None
    build_index(config)
    with pytest.raises(ConfigError, match=r"Set dataplane\.eos_token \(dataplane\.eos_id with dataplane\.vocab_size\)"):
        open_source(config, Local())


def test_an_index_of_another_vocabulary_is_refused(overrides: list[str]) -> None:
    build_index(compose([*overrides, "dataplane.vocab_size=50", "dataplane.eos_id=7"]))
    with pytest.raises(PropertyIndexError, match=r"but dataplane\.vocab_size=60 is"):
        open_source(compose([*overrides, "dataplane.vocab_size=60", "dataplane.eos_id=7"]), Local())


def test_samples_of_stored_tokens_are_whole_documents(overrides: list[str]) -> None:
    """A run in samples serves the ids of each document, also where a block has other rows."""
    settings = ["dataplane.vocab_size=50", "dataplane.eos_id=7", "mixture.unit=samples", "index.block_rows=5"]
    settings += ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1", "dataplane.global_batch_size=3"]
    config = compose([*overrides, *settings])
    build_index(config)
    with DataPlane.open(config, comm=Local()) as plane:
        served = [payload["tokens"].tolist() for batch in plane for payload in batch.payloads or [] if payload]
    rng = np.random.Generator(np.random.Philox(0))
    documents = [[*rng.integers(10, 50, 40).tolist(), *([7] if i % 2 else [])] for i in range(10)]
    assert sorted(served) == sorted([*documents, [], [7]])
