"""`index verify --deep` compares a token store with the documents that it samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import compose
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.token_store.store_check import changed_stores, refuse_changed_stores
from mixtera_hpc.index.token_store.store_files import StoreFiles
from mixtera_hpc.testing.chats import CHATS, TEMPLATES, write_tokenizer
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.testing.writers import write_compressed
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_vocabulary

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "again"]


def texts(seed: int, count: int) -> list[dict[str, Any]]:
    random = np.random.Generator(np.random.Philox(seed))
    lengths = random.integers(0, 40, count).tolist()
    return [{"text": " ".join(random.choice(WORDS, length)), "lang": "ab"[length % 2]} for length in lengths]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return overrides for two plain shards with a bad row each and a compressed one, indexed, with their store."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        lines = [json.dumps(row) for row in texts(number, 30)]
        (data / f"{number}.jsonl").write_text("\n".join([*lines[:4], "{damaged", *lines[4:]]))
    write_compressed(data, texts(7, 30), ending="gz")
    words = [
        *(f"data.root={data}", f"index.path={tmp_path / 'i.h5'}", "index.block_rows=16", "data.properties.lang=lang"),
        *("data.on_bad_sample=skip", "data.materialize=never"),
        f"dataplane.tokenizer={train_bpe(['the quick brown fox ' * 9], 300, tmp_path / 'tokenizer.json')}",
    ]
    assert main(["index", "build", *words]) == 0
    assert main(["tokenize", *words]) == 0
    return words


def tokens_of(tmp_path: Path) -> Path:
    return StoreFiles(tmp_path / "i.h5.tokens").tokens


def verified(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(["index", "verify", "--deep", *words]) == code
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_an_unchanged_store_passes(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "samples, tokens included" in verified(overrides, capsys)
    # Also after a refresh, which lays further documents out behind the others.
    (tmp_path / "data" / "more.jsonl").write_text("\n".join(json.dumps(row) for row in texts(9, 30)))
    assert main(["index", "refresh", *overrides]) == 0
    assert main(["tokenize", *overrides]) == 0
    answer = json.loads(verified([*overrides, "--json"], capsys))
    assert (answer["fresh"], answer["stores"]) == (True, [])


def test_other_tokens_are_named_with_their_document(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tokens_of(tmp_path)
    stored = np.fromfile(path, "<u2")
    wrong = stored.copy()
    wrong[0] ^= 1  # Of the first document with the first combination of values.
    wrong.tofile(path)
    text = verified(overrides, capsys, 2)
    answer = json.loads(verified([*overrides, "--json"], capsys, 2))
    assert not answer["fresh"]
    [row] = answer["stores"]
    assert f"i.h5.tokens differ from those of the documents in 1 shard:\n    {row}\n" in text
    assert "run mixtera-hpc tokenize again, or set data.tokens=off" in text
    first = next(n for n, sample in enumerate(texts(0, 30)) if sample["lang"] == "a" and sample["text"])
    assert row == f"0.jsonl row {first + (first > 3)}"  # Row 4 is damaged.
    for unread in ("data.tokens=off", "mixture.unit=samples"):
        assert json.loads(verified([*overrides, "--json", unread], capsys))["stores"] == []
    # A copy that was cut off and filled with zeros.
    np.where(np.arange(len(stored)) < len(stored) // 2, stored, 0).astype("<u2").tofile(path)
    assert len(json.loads(verified([*overrides, "--json"], capsys, 2))["stores"]) == 3


def test_any_number_of_ranks_finds_the_same(overrides: list[str], tmp_path: Path) -> None:
    path = tokens_of(tmp_path)
    (np.fromfile(path, "<u2") ^ 1).astype("<u2").tofile(path)
    config = compose([*overrides, "mixture.unit=tokens"])
    tokenizer = load_vocabulary(config.dataplane)
    assert tokenizer is not None

    def check(comm: Any) -> Any:
        with open_configured(config) as index:
            return changed_stores(config, index, tokenizer, comm)

    (alone,) = run_ranks(1, check)
    assert len(alone) == 3
    assert run_ranks(2, check) == [alone, []]
    other = replace(alone[0], store="/other.tokens")
    with pytest.raises(
        DataError, match=r"documents in 4 shards.*(?s:.)*Remove .*i\.h5\.tokens, /other\.tokens and run"
    ):
        refuse_changed_stores([*alone, other])


@pytest.mark.parametrize("chat_loss", ["assistant", "all"])
def test_marks_of_conversations_count_unless_a_run_ignores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chat_loss: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    chats = [CHATS[number % len(CHATS)] for number in range(20)]
    (data / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tokenizer = write_tokenizer(tmp_path / "chat", TEMPLATES["inst_marked"], "adds_bos")
    words = [
        *(f"data.root={data}", f"index.path={tmp_path / 'i.h5'}", "data.text=chat:messages", "data.materialize=never"),
        f"dataplane.tokenizer={tokenizer}",
    ]
    assert main(["index", "build", *words]) == 0
    assert main(["tokenize", *words]) == 0
    assert "tokens included" in verified([*words, f"dataplane.chat_loss={chat_loss}"], capsys)
    (np.fromfile(tokens_of(tmp_path), "<u4") ^ (1 << 31)).astype("<u4").tofile(tokens_of(tmp_path))
    code = 2 if chat_loss == "assistant" else 0
    assert (
        "differ from those of the documents" in verified([*words, f"dataplane.chat_loss={chat_loss}"], capsys, code)
    ) == (code == 2)
