"""Whatever encodes many texts says why a tokenizer is left to the slower library."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixtera_hpc import DataPlane, compose
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.tokens.bpe_training import train_bpe

WARNING = "is encoded by Hugging Face's tokenizers, about 50 times slower"


def configured(folder: Path, *, is_split: bool) -> Config:
    """Write data and a tokenizer, which gigatoken does not encode if it does not split texts; build no index yet."""
    folder.mkdir()
    texts = [f"document {number} with some words" for number in range(64)]
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, 300, folder / "tokenizer.json")
    if not is_split:
        content = json.loads(tokenizer.read_bytes())
        tokenizer.write_text(json.dumps({**content, "pre_tokenizer": None}))
    settings = {"data.root": folder / "data", "index.path": folder / "index.h5", "dataplane.tokenizer": tokenizer}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return compose([*overrides, "mixture=natural", "dataplane.seq_len=16", "dataplane.global_batch_size=2"])


def test_the_slower_library_is_named_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(tmp_path / "slow", is_split=False)
    build_index(config)
    with DataPlane.open(config) as plane:
        next(iter(plane))
    write_store(config, Local())
    warnings = [record.message for record in caplog.records if WARNING in record.message]
    assert len(warnings) == 3
    assert all("its pre-tokenizer does not end with ByteLevel" in warning for warning in warnings)

    # Nothing is encoded any more.
    caplog.clear()
    with DataPlane.open(config) as plane:
        next(iter(plane))
    assert WARNING not in caplog.text


def test_a_build_that_writes_a_token_store_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(tmp_path / "slow", is_split=False)
    report = build_index(replace(config, data=replace(config.data, materialize="always")), announce=lambda plan: None)
    assert report.token_store is not None
    assert caplog.text.count(WARNING) == 1


def test_the_faster_library_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(tmp_path / "fast", is_split=True)
    build_index(config)
    with DataPlane.open(config) as plane:
        next(iter(plane))
    assert WARNING not in caplog.text
