"""`data.materialize`: index build writes token ids, refresh extends them, and runs serve the same stream from them."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.token_store.store_files import StoreFiles, StoreHeader
from mixtera_hpc.index.token_store.store_state import prepare_store
from mixtera_hpc.testing.chats import CHATS, TEMPLATES, write_tokenizer
from mixtera_hpc.testing.writers import write_compressed
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_vocabulary

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]


def make_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Return rows of three languages, with texts of any length."""
    random = np.random.Generator(np.random.Philox(seed))
    return [
        {"text": " ".join(random.choice(WORDS, int(random.integers(0, 60)))), "lang": "abc"[int(random.integers(0, 3))]}
        for _ in range(count)
    ]


def add_shard(root: Path, number: int, count: int = 60) -> None:
    """Write a compressed file of one frame, and one that is damaged in one row."""
    folder = root / "data" / str(number)
    folder.mkdir(parents=True)
    write_compressed(folder, make_rows(number, count), ending="zst")
    lines = [json.dumps(row) for row in make_rows(100 + number, 30)]
    lines[7] = "{damaged"
    (folder / "plain.jsonl").write_text("\n".join(lines))


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return overrides for compressed and plain shards, and a run over them."""
    for number in range(3):
        add_shard(tmp_path, number)
    tokenizer = train_bpe(["the quick brown fox " * 9], 300, tmp_path / "tokenizer.json")
    return [
        f"data.root={tmp_path / 'data'}",
        "data.on_bad_sample=skip",
        "data.properties.lang=lang",
        f"dataplane.tokenizer={tokenizer}",
        *run_settings(tmp_path),
    ]


def run_settings(folder: Path) -> list[str]:
    return [
        f"index.path={folder / 'i.h5'}",
        "dataplane.seq_len=33",
        "dataplane.global_batch_size=4",
        "dataplane.chunk_steps=2",
        "dataplane.audit=true",
        "dataplane.workers=0",
        "mixture.group_by=[lang]",
        "mixture.on_exhausted=stop",
        "mixture.max_epochs=2",
    ]


def served(overrides: list[str], *more: str) -> list[Any]:
    """Return all that a run serves."""
    with DataPlane.open(compose([*overrides, *more]), comm=Local()) as plane:
        batches = [(b.digests, b.domain_ids.tolist(), b.document_ids.tolist(), b.loss_mask.tolist()) for b in plane]
    assert len(batches) > 10
    return batches


def check_stream(overrides: list[str], *more: str) -> None:
    """Check that a run reads stored tokens only, and serves what it serves without."""
    assert DocumentReader(open_source(compose([*overrides, *more]), Local())).holds_all_tokens
    assert served(overrides, *more) == served(overrides, *more, "data.tokens=off")


def header_of(folder: Path) -> StoreHeader:
    header = StoreFiles(folder).read_header()
    assert header is not None and header.complete
    return header


def contents(folder: Path) -> tuple[bytes, bytes]:
    """Return the tokens and starts of a complete store, which has nothing else beside them."""
    files = StoreFiles(folder)
    header = header_of(folder)
    assert {path.name for path in folder.iterdir()} == {"lock", "store.json", "tokens.bin", header.starts}
    return files.tokens.read_bytes(), files.starts(header).read_bytes()


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Let files grow to this size only, as a disk that is full would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_build_writes_what_tokenize_writes(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "build", *overrides, "index.threads=2", "--json"]) == 0
    output = capsys.readouterr()
    assert "Token ids are written to" in output.err
    assert json.loads(output.out)["token_store"]["units_written"] == 6
    check_stream(overrides)
    written = contents(tmp_path / "i.h5.tokens")
    other = tmp_path / "other"
    assert main(["tokenize", *overrides, f"data.tokens={other}"]) == 0
    assert contents(other) == written
    # Another build of the same data leaves the store as it is.
    before = (tmp_path / "i.h5.tokens/tokens.bin").stat().st_mtime_ns
    assert main(["index", "build", *overrides]) == 0
    assert contents(tmp_path / "i.h5.tokens") == written
    assert (tmp_path / "i.h5.tokens/tokens.bin").stat().st_mtime_ns == before


def test_the_configuration_and_the_data_decide(overrides: list[str], tmp_path: Path) -> None:
    store = tmp_path / "i.h5.tokens"
    for words in (
        ["data.materialize=never"],
        ["data.tokens=off"],
        # Rows of plain files are read one by one.
        ["data.include=['**/*.jsonl']"],
        ["mixture.unit=samples", "data.materialize=never"],
    ):
        assert main(["index", "build", *overrides, *words]) == 0
        assert not store.exists(), words
    assert main(["index", "build", *overrides, "data.include=['**/*.jsonl']", "data.materialize=always"]) == 0
    assert header_of(store).tokens > 1000


def test_a_refresh_extends_the_store(overrides: list[str], tmp_path: Path) -> None:
    store = tmp_path / "i.h5.tokens"
    assert main(["index", "build", *overrides]) == 0
    first = header_of(store)
    tokens, _ = contents(store)
    stream = served(overrides)

    add_shard(tmp_path, 3)
    assert main(["index", "refresh", *overrides]) == 0
    second = header_of(store)
    assert second.kept_tokens == first.tokens < second.tokens
    # Nothing that was there is written again.
    assert contents(store)[0].startswith(tokens)
    check_stream(overrides)
    # A run of the earlier generation continues with the same store.
    assert served(overrides, f"index.generations=[{first.index}]") == stream

    shutil.rmtree(tmp_path / "data/1")
    (tmp_path / "data/2/plain.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(55, 20)))
    assert main(["index", "refresh", *overrides]) == 0
    assert header_of(store).kept_tokens == second.tokens
    check_stream(overrides)


def test_tokenize_extends_a_store_after_a_refresh_without_it(overrides: list[str], tmp_path: Path) -> None:
    store = tmp_path / "i.h5.tokens"
    assert main(["index", "build", *overrides]) == 0
    first = header_of(store)
    add_shard(tmp_path, 3)
    assert main(["index", "refresh", *overrides, "data.materialize=never"]) == 0
    assert main(["plan", *overrides]) == 2
    assert main(["tokenize", *overrides]) == 0
    assert header_of(store).kept_tokens == first.tokens
    check_stream(overrides)


def test_logs_of_a_complete_store_say_nothing_about_the_next_one(overrides: list[str], tmp_path: Path) -> None:
    store = tmp_path / "i.h5.tokens"
    assert main(["index", "build", *overrides]) == 0
    # What a job leaves that is killed between its last two writes.
    (store / "done-1-0.log").write_text("0\n1\n2\n")
    add_shard(tmp_path, 3)
    assert main(["index", "refresh", *overrides, "data.materialize=never"]) == 0
    config = compose(overrides)
    tokenizer = load_vocabulary(config.dataplane)
    assert tokenizer is not None
    with open_written(config, announce=False) as index:
        jobs = [prepare_store(index, StoreFiles(store), tokenizer, "", None, lambda plan: None) for _ in range(2)]
    assert jobs[0].missing == jobs[1].missing != []


def test_a_derivation_keeps_the_store(overrides: list[str], tmp_path: Path) -> None:
    assert main(["index", "build", *overrides]) == 0
    tokens, _ = contents(tmp_path / "i.h5.tokens")
    function = "{function: mixtera_hpc.index.document_functions.length_bucket}"
    assert main(["index", "derive", *overrides, f"data.properties.size={function}"]) == 0
    assert (tmp_path / "i.h5.tokens/tokens.bin").read_bytes() == tokens
    check_stream(overrides)
    check_stream(overrides, "mixture.group_by=[size]")


def test_conversations_are_stored_with_their_marks(overrides: list[str], tmp_path: Path) -> None:
    chats = tmp_path / "chats"
    chats.mkdir()
    rows = [{"messages": CHATS[i % len(CHATS)], "lang": "ab"[i % 2]} for i in range(150)]
    write_compressed(chats, rows, ending="gz")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TEMPLATES["inst_marked"], "adds_bos")
    sets = f"{{chats: {{root: {chats}, text: 'chat:messages'}}, texts: {tmp_path / 'data'}}}"
    own = [word for word in overrides if not word.startswith(("data.root", "dataplane.tokenizer"))]
    own += [f"data.sets={sets}", f"dataplane.tokenizer={tokenizer}"]
    assert main(["index", "build", *own]) == 0
    assert header_of(tmp_path / "i.h5.tokens").chat_loss == "assistant"
    check_stream(own)
    check_stream(own, "mixture.group_by=[dataset]", "dataplane.predict_across_documents=true")
    # A run that trains on everything passes over the marks.
    check_stream(own, "dataplane.chat_loss=all")
    assert served(own) != served(own, "dataplane.chat_loss=all")

    assert main(["index", "build", *own, "dataplane.chat_loss=all", f"index.path={tmp_path / 'all.h5'}"]) == 0
    assert main(["plan", *own, f"index.path={tmp_path / 'all.h5'}"]) == 2


def test_a_full_disk_is_reported_and_the_build_continues(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "i.h5.tokens"
    assert main(["index", "build", *overrides]) == 0
    expected = contents(store)
    shutil.rmtree(store)

    # While the data is scanned.
    with file_limit(len(expected[0]) // 2):
        assert main(["index", "build", *overrides]) == 2
    message = capsys.readouterr().err
    assert f"The token ids cannot be written to {store}/.spool: File too large." in message
    assert "run the same command again: it continues" in message
    assert main(["index", "build", *overrides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_units"] > 0
    assert contents(store) == expected

    # While the store is written.
    shutil.rmtree(store)
    with file_limit(len(expected[0]) // 2):
        assert main(["tokenize", *overrides]) == 2
    assert f"The token store cannot be written to {store}: File too large." in capsys.readouterr().err
    assert main(["tokenize", *overrides]) == 0
    assert contents(store) == expected


def test_tokens_that_a_crash_has_lost_are_made_again(overrides: list[str], tmp_path: Path) -> None:
    store = tmp_path / "i.h5.tokens"
    assert main(["index", "build", *overrides]) == 0
    expected = contents(store)
    shutil.rmtree(store)
    # Every unit is scanned, but the last files do not fit.
    with file_limit(len(expected[0]) - 8):
        assert main(["index", "build", *overrides]) == 2
    for spool in (store / ".spool").iterdir():
        spool.write_bytes(spool.read_bytes()[:-100])
    assert main(["index", "build", *overrides]) == 0
    assert contents(store) == expected
