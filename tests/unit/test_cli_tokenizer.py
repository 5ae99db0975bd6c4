"""`mixtera-hpc tokenizer train`: a sample in the proportions of the mixture, the same file every time."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.reading.text_sample import sample_texts
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.tokenizer import load_tokenizer


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return the overrides of an index without token counts; 300 documents of two sources, one of them rare."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"word{i} and {'x' * (i % 7)}", "source": "rare" if i % 10 == 0 else "web"} for i in range(300)]
    (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = [f"data.root={data}", f"index.path={tmp_path / 'i.h5'}", "data.properties.source=source"]
    build_index(compose([*build, "mixture.unit=samples"]))
    return [*build, "mixture.group_by=[source]"]


def test_the_sample_has_the_proportions_of_the_mixture_and_no_document_twice(overrides: list[str]) -> None:
    mixture = ["mixture.kind=static", "mixture.unit=samples"]
    mixture.append("mixture.domains=[{key: {source: rare}, weight: 0.5}, {key: {source: web}, weight: 0.5}]")
    texts = list(sample_texts(compose([*overrides[:3], *mixture]), 1 << 40))
    assert sorted({text.text for text in texts}) == sorted(text.text for text in texts)
    assert len(texts) == 300
    # The rare domain ends after its 30 documents; until then both have equal shares.
    assert Counter(text.domain for text in texts[:60]) == {"source=rare": 30, "source=web": 30}


def test_the_sample_ends_at_its_size_and_is_the_same_every_time(overrides: list[str]) -> None:
    config = compose([*overrides, "mixture.unit=samples"])
    texts = [text.text for text in sample_texts(config, 500)]
    assert 500 <= sum(map(len, texts)) < 600
    assert texts == [text.text for text in sample_texts(config, 500)]


def test_a_tokenizer_is_trained_and_can_count_the_same_index(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "out" / f"{name}.json" for name in "ab"]
    for file in files:
        words = ["tokenizer", "train", *overrides, "--out", str(file), "--vocab-size", "280"]
        assert main([*words, "--special-token", "<|im_start|>"]) == 0
    out = capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    assert re.search(r"Trained on 300 documents with [\d,]+ bytes of text:\n  source=web  9\d\.\d%", out)
    assert re.search(r"280 tokens, [\d.]+ bytes per token", out)
    assert load_tokenizer(files[0]).eos_id == 0
    assert build_index(compose([*overrides, f"dataplane.tokenizer={files[0]}"])).tokens > 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "10"], r"The size of the vocabulary is 10, but must be at least 257"),
        (["--sample-mb", "0"], r"--sample-mb is 0, but must be above 0"),
        (["--out", "tokenizer"], r"--out is 'tokenizer', but must end in \.json"),
        (["query.where=source == 'other'"], r"no sample has source = 'other'"),
    ],
)
def test_wrong_input_is_refused(
    options: list[str], message: str, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    assert main(["tokenizer", "train", *overrides, "--out", str(out), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_a_file_that_exists_is_not_replaced(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    out.write_text("mine")
    assert main(["tokenizer", "train", *overrides, "--out", str(out)]) == 2
    assert "which exists" in capsys.readouterr().err and out.read_text() == "mine"


def test_token_ids_are_not_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    write_megatron(tmp_path / "data" / "a.bin", [np.arange(9).tolist()] * 4)
    overrides = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]
    build_index(compose([*overrides, "dataplane.vocab_size=50"]))
    assert main(["tokenizer", "train", *overrides, "--out", str(tmp_path / "t.json")]) == 2
    assert "holds token ids, but texts are needed" in capsys.readouterr().err
