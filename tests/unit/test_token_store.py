"""`mixtera-hpc tokenize`: the stream of a run is the same from a token store; wrong stores are refused."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.residency.decode_cost import decode_cost
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.scan.parallel_scan import ScanProgress
from mixtera_hpc.index.scan.scan_log import build_lock
from mixtera_hpc.index.store_folder import log_unit
from mixtera_hpc.index.token_store.store_files import StoreFiles
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.testing.writers import write_compressed
from mixtera_hpc.tokens.bpe_training import train_bpe
from tests.unit.file_times import make_old, wait_for_new_time

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "<|endoftext|>", "again"]


def make_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Return rows of three languages, with texts of any length."""
    random = np.random.Generator(np.random.Philox(seed))
    return [
        {"text": " ".join(random.choice(WORDS, int(random.integers(0, 60)))), "lang": "abc"[int(random.integers(0, 3))]}
        for _ in range(count)
    ]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return overrides for shards of text, plain and compressed, with bad rows, beside a shard of token ids."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        lines = [json.dumps(row) for row in make_rows(number, 70)]
        lines[9] = "{damaged"
        (data / f"{number}.jsonl").write_text("\n".join(lines))
    # The build skips all rows of this shard.
    (data / "skipped.jsonl").write_text("{damaged\n{damaged")
    (data / "packed").mkdir()
    write_compressed(data / "packed", make_rows(7, 50), ending="gz")
    write_megatron(data / "ids.bin", [[5, 6, 7] * (i % 9) for i in range(40)])
    tokenizer = train_bpe(["the quick brown fox " * 9], 300, tmp_path / "tokenizer.json", ["<s>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return [
        f"data.root={data}",
        f"index.path={tmp_path / 'i.h5'}",
        "index.block_rows=16",
        "data.properties.lang=lang",
        "data.on_bad_sample=skip",
        f"dataplane.tokenizer={tokenizer}",
        "dataplane.seq_len=33",
        "dataplane.global_batch_size=4",
        "dataplane.chunk_steps=2",
        "dataplane.audit=true",
        # Every stream is served several times: a process for each would take seconds to start.
        "dataplane.workers=0",
        "mixture.on_exhausted=stop",
        "mixture.max_epochs=2",
    ]


def served(overrides: list[str], *more: str) -> list[Any]:
    """Return all that a run serves."""
    with DataPlane.open(compose([*overrides, *more]), comm=Local()) as plane:
        return [
            (batch.digests, batch.domain_ids.tolist(), batch.document_ids.tolist(), batch.loss_mask.tolist())
            for batch in plane
        ]


def tokenize(overrides: list[str], *more: str) -> int:
    return main(["tokenize", *overrides, *more])


STREAMS = {
    "by language": ["mixture=natural", "mixture.group_by=[lang]"],
    "single domain": ["mixture=natural", "mixture.group_by=[]"],
    "selected, blocks shuffled": ["mixture=natural", "query.where=lang == 'a'", "dataplane.shuffle=block"],
    "no shuffle, no overlap": ["mixture=natural", "dataplane.shuffle=none", "dataplane.overlap_one_token=false"],
    "no end token": ["mixture=natural", "mixture.group_by=[lang]", "dataplane.add_eos=false"],
    "held out": ["mixture=natural", "query.holdout={fraction: 0.2}", "dataplane.predict_across_documents=true"],
}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param([], marks=pytest.mark.full),
        ["dataplane.add_bos=true"],
        pytest.param(["dataplane.special_tokens_in_text=allow"], marks=pytest.mark.full),
    ],
)
def test_the_stream_is_the_one_tokenized_on_the_fly(
    build: list[str], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*overrides, *build]
    build_index(compose(overrides))
    on_the_fly = {name: served(overrides, *more) for name, more in STREAMS.items()}
    assert tokenize(overrides) == 0
    assert re.search(r"tokens of 2 bytes: .* GB in .*i\.h5\.tokens, .* GB free", capsys.readouterr().err)

    # The texts are not needed any more, so a run cannot have read them.
    config = compose([*overrides, *STREAMS["by language"]])
    source = open_source(config, Local())
    assert DocumentReader(source).holds_all_tokens
    # Nothing of the compressed shard is decoded any more.
    shape = JobShape.of_job(source, 1, 1)
    served_per_step = np.full(source.num_domains, 100.0)
    assert decode_cost(source, served_per_step, shape) is None
    without = open_source(compose([*overrides, *STREAMS["by language"], "data.tokens=off"]), Local())
    assert decode_cost(without, served_per_step, shape) is not None
    for name, more in STREAMS.items():
        assert len(on_the_fly[name]) > 10
        assert served(overrides, *more) == on_the_fly[name], name
        assert served(overrides, *more, "data.tokens=off") == on_the_fly[name], name


def test_the_store_may_be_in_another_folder(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    expected = served(overrides)
    folder = f"data.tokens={tmp_path / 'elsewhere'}"
    assert tokenize(overrides, folder) == 0
    assert served(overrides, folder) == expected
    assert not (tmp_path / "i.h5.tokens").exists()
    # A complete store is left as it is.
    before = (tmp_path / "elsewhere/tokens.bin").stat().st_mtime_ns
    assert tokenize(overrides, folder) == 0
    assert (tmp_path / "elsewhere/tokens.bin").stat().st_mtime_ns == before


def test_several_indexes_have_their_own_stores(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(3, 80)))
    second = [*overrides, f"data.root={other}", f"index.path={tmp_path / 'j.h5'}"]
    build_index(compose(second))
    joined = [*overrides[2:], f"index.paths=[{tmp_path / 'i.h5'},{tmp_path / 'j.h5'}]", "mixture.group_by=[lang]"]
    joined = [entry for entry in joined if not entry.startswith(("data.properties", "data.on_bad", "index.block"))]
    expected = served(joined)
    # With one store the other index is tokenized on the fly.
    for of_index in (second, overrides):
        assert tokenize(of_index) == 0
        assert served(joined) == expected
    with pytest.raises(ConfigError, match=r"reads 2 indexes, each with its own store"):
        served(joined, f"data.tokens={tmp_path / 'i.h5.tokens'}")


def test_a_store_of_another_tokenizer_is_refused(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides) == 0
    with_bos = [*overrides, "dataplane.add_bos=true"]
    assert tokenize(with_bos) == 2
    build_index(compose(with_bos))
    with pytest.raises(ConfigError, match=r"was made with tokenizer \w{12}, but the index with \w{12}"):
        served(with_bos)
    expected = served(with_bos, "data.tokens=off")
    assert tokenize(with_bos) == 0
    assert served(with_bos) == expected


def test_a_store_of_another_generation_is_refused(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides) == 0
    (tmp_path / "data/new.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(9, 30)))
    assert main(["index", "refresh", *overrides, "data.materialize=never"]) == 0
    with pytest.raises(ConfigError, match=r"was made from index \w{12}, but the index is \w{12} now"):
        served(overrides)
    expected = served(overrides, "data.tokens=off")
    assert tokenize(overrides) == 0
    assert served(overrides) == expected


def test_incomplete_and_missing_stores_are_refused(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    with pytest.raises(ConfigError, match="holds no token store"):
        served(overrides, f"data.tokens={tmp_path / 'nothing'}")
    assert tokenize(overrides) == 0
    files = StoreFiles(tmp_path / "i.h5.tokens")
    header = files.header.read_text()
    files.header.write_text(header.replace('"complete": true', '"complete": false'))
    with pytest.raises(ConfigError, match="is incomplete"):
        served(overrides)
    files.header.write_text(header)
    files.tokens.write_bytes(files.tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match="it was cut off or removed"):
        served(overrides)


def test_a_store_that_is_written_again_ends_the_run(overrides: list[str]) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides) == 0
    files = StoreFiles(Path(f"{compose(overrides).index.path}.tokens"))
    header = files.read_header()
    assert header is not None
    tokens = files.tokens.read_bytes()

    def rewrite() -> None:
        """Begin the store again, as `mixtera-hpc tokenize` does after another `dataplane.chat_loss`."""
        files.header.unlink()
        files.tokens.unlink()
        files.write_header(msgspec.structs.replace(header, complete=False))
        files.tokens.write_bytes(bytes(len(tokens)))

    def change() -> None:
        files.tokens.write_bytes(tokens[:-2] + b"\0\0")

    def change_and_restore_time() -> None:
        times = files.tokens.stat()
        with files.tokens.open("r+b") as file:
            file.write(bytes(2))
        os.utime(files.tokens, ns=(times.st_atime_ns, times.st_mtime_ns))

    for damage, problem in (
        (rewrite, "it is being written again"),
        (files.header.unlink, "header was removed|cannot be found"),
        (change, "its tokens have changed"),
        (change_and_restore_time, "its tokens have changed"),
        (files.tokens.unlink, "cannot be found"),
    ):
        with DataPlane.open(compose([*overrides, "mixture=natural"]), Local()) as plane:
            batches = iter(plane)
            next(batches)
            wait_for_new_time(files.tokens)
            damage()
            with pytest.raises(DataError, match=f"has changed while the run reads it: .*({problem})"):
                list(batches)
        files.write_header(header)
        files.tokens.write_bytes(tokens)


def test_a_run_continues_after_new_permissions_of_its_store(overrides: list[str]) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides) == 0
    files = StoreFiles(Path(f"{compose(overrides).index.path}.tokens"))
    expected = [digests for digests, *_ in served(overrides, "mixture=natural")]
    with DataPlane.open(compose([*overrides, "mixture=natural"]), Local()) as plane:
        digests = []
        for batch in plane:
            digests.append(batch.digests)
            for path in (files.tokens, files.header):
                path.chmod(0o640)
    assert digests == expected


def test_a_run_continues_while_a_refresh_extends_its_store(overrides: list[str]) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides) == 0
    files = StoreFiles(Path(f"{compose(overrides).index.path}.tokens"))
    header = files.read_header()
    assert header is not None
    expected = [digests for digests, *_ in served(overrides, "mixture=natural")]
    extended = {"index": "f" * 32, "generations": [header.index], "kept_tokens": header.tokens}
    with DataPlane.open(compose([*overrides, "mixture=natural"]), Local()) as plane:
        digests = []
        for number, batch in enumerate(plane):
            digests.append(batch.digests)
            if number == 1:
                files.write_header(msgspec.structs.replace(header, **extended, complete=False))
            elif number == 2:
                with files.tokens.open("ab") as file:
                    file.write(bytes(64))
            elif number == 3:
                files.write_header(
                    msgspec.structs.replace(header, **extended, tokens=header.tokens + 32, complete=True)
                )
    assert len(digests) > 5
    assert digests == expected


def test_a_line_of_a_log_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    # As on a disk that is nearly full.
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1]))
    with (tmp_path / "done-1-0.log").open("wb") as file:
        log_unit(file.fileno(), 123)
        log_unit(file.fileno(), 45)
    # What a crash may leave, and a line that was cut short.
    (tmp_path / "done-2-0.log").write_bytes(b"\0\0\n6\n7x\n8")
    assert StoreFiles(tmp_path).logged_units() == {123, 45, 6}


def test_a_damaged_header_is_refused_with_a_cure(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "build", *overrides, "data.materialize=always"]) == 0
    store = tmp_path / "i.h5.tokens"
    (store / "store.json").write_text('{"version": 2')
    for verb in ("tokenize", "plan"):
        assert main([verb, *overrides]) == 2
        message = capsys.readouterr().err
        assert f"Remove {store} and run mixtera-hpc tokenize again, or set data.tokens=off." in message
    shutil.rmtree(store)
    assert main(["tokenize", *overrides]) == 0
    assert main(["plan", *overrides]) == 0


def test_data_that_changes_while_it_is_tokenized_is_refused(overrides: list[str], tmp_path: Path) -> None:
    config = compose(overrides)
    shard = tmp_path / "data" / "2.jsonl"
    make_old(shard)
    build_index(config)
    content = shard.read_bytes()
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    # As many tokens in every document.
    other = content.replace(b"dog", b"god")
    assert other != content

    def change(state: ScanProgress) -> None:
        if shard.read_bytes() == content:
            shard.write_bytes(other)

    with pytest.raises(PropertyIndexError, match=r"(?s)is stale: 1 of .* not what was indexed:\n +2\.jsonl .*Restore"):
        write_store(config, Local(), progress=change)
    shard.write_bytes(content)
    os.utime(shard, ns=times)
    write_store(config, Local())
    assert served(overrides) == served(overrides, "data.tokens=off")


def test_two_jobs_at_once_are_refused(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(compose(overrides))
    folder = tmp_path / "tokens"
    folder.mkdir()
    with build_lock(folder):
        assert main(["tokenize", *overrides, f"data.tokens={folder}"]) == 2
    message = capsys.readouterr().err
    assert f"Another process is writing this token store: {folder} is locked" in message
    assert "set another data.tokens" in message


def test_wrong_input_is_refused_with_exit_code_2(overrides: list[str], tmp_path: Path) -> None:
    build_index(compose(overrides))
    assert tokenize(overrides, "data.tokens=off") == 2
    assert tokenize([entry for entry in overrides if "tokenizer" not in entry]) == 2
    # The folder of the data is no token store, and stays as it is.
    assert tokenize(overrides, f"data.tokens={tmp_path / 'data'}") == 2
    assert (tmp_path / "data/0.jsonl").exists()
    shutil.copy(tmp_path / "data/1.jsonl", tmp_path / "data/0.jsonl")
    assert tokenize(overrides) == 2
