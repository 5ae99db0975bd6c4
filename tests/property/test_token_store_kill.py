"""After a SIGKILL at any moment, the same command finishes the token store, with the same bytes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.token_store.store_files import StoreFiles
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.tokens.bpe_training import train_bpe
from tests.property.killed_jobs import Killed, killed_before

NUM_SHARDS = 6
PROGRAM = """
import sys
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.token_store.store_job import write_store
write_store(compose(sys.argv[1:]), Local(), progress=lambda state: print("unit", flush=True) or sys.stdin.readline())
"""


def overrides_of(root: Path) -> list[str]:
    return [
        f"data.root={root / 'data'}",
        f"index.path={root / 'i.h5'}",
        "data.properties.c=c",
        f"dataplane.tokenizer={root / 'tokenizer.json'}",
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an index of several shards."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "data").mkdir()
    for i in range(NUM_SHARDS):
        lines = [json.dumps({"text": f"shard {i} row {j} " * (j % 7), "c": "abc"[j % 3]}) for j in range(40)]
        (folder / f"data/{i}.jsonl").write_text("\n".join(lines))
    train_bpe(["shard row " * 9], 300, folder / "tokenizer.json")
    build_index(compose(overrides_of(folder)))
    return folder


def contents(config: Config) -> tuple[bytes, bytes]:
    """Return the bytes of the complete store of a configuration."""
    files = StoreFiles(Path(config.data.tokens))
    header = files.read_header()
    assert header is not None and header.complete
    assert not files.logs()
    return files.tokens.read_bytes(), files.starts(header).read_bytes()


def write_and_kill(overrides: list[str], after_units: int) -> None:
    """Let a job write some units, then SIGKILL it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *overrides], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    for _ in range(after_units):
        assert process.stdout.readline() == b"unit\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.stdout.readline() == b"unit\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)


@pytest.mark.parametrize("before", ["nothing", "complete", "half"])
def test_a_job_that_is_killed_at_any_call_is_continued(before: str, root: Path, tmp_path: Path) -> None:
    """The folder is empty at first, or holds what another tokenizer has written."""
    other = train_bpe(["abc def " * 9], 280, tmp_path / "other.json")
    words = [*overrides_of(root), f"dataplane.tokenizer={other}", f"index.path={tmp_path / 'other.h5'}"]
    build_index(compose(words))
    write_store(compose([*words, f"data.tokens={tmp_path / 'other'}"]), Local())
    if before == "half":
        header = tmp_path / "other" / "store.json"
        header.write_text(header.read_text().replace('"complete": true', '"complete": false'))
        (tmp_path / "other" / "done-1-0.log").write_text("0\n2\n")
    write_store(compose([*overrides_of(root), f"data.tokens={tmp_path / 'whole'}"]), Local())

    folder = tmp_path / "killed"
    config = compose([*overrides_of(root), f"data.tokens={folder}"])
    expected = sorted((path.name, path.read_bytes()) for path in (tmp_path / "whole").iterdir())
    is_complete = False
    for call in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        if before != "nothing":
            shutil.copytree(tmp_path / "other", folder)
        try:
            with killed_before(call):
                write_store(config, Local())
                is_complete = True
        except Killed:
            pass
        write_store(config, Local())
        assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == expected, call
        if is_complete:
            break
    assert call > 2 * NUM_SHARDS


@pytest.mark.parametrize("after_units", [0, 3, NUM_SHARDS - 1])
def test_a_killed_job_is_continued(after_units: int, root: Path, tmp_path: Path) -> None:
    whole = compose([*overrides_of(root), f"data.tokens={tmp_path / 'whole'}"])
    write_store(whole, Local())
    overrides = [*overrides_of(root), f"data.tokens={tmp_path / 'killed'}"]
    config = compose(overrides)
    write_and_kill(overrides, after_units)
    with pytest.raises(ConfigError, match="is incomplete"):
        open_source(config, Local())
    report = write_store(config, Local())
    assert report.units_written == NUM_SHARDS - after_units - 1
    assert contents(config) == contents(whole)
    assert len(contents(config)[0]) > 1000


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_prefix_of_the_writes_is_continued(data: st.DataObject, root: Path) -> None:
    # The state after a kill: a log that ends anywhere, and any bytes where no logged unit lies.
    folder = root / "drawn"
    config = compose([*overrides_of(root), f"data.tokens={folder}"])
    shutil.rmtree(folder, ignore_errors=True)
    write_store(config, Local())
    expected = contents(config)
    files = StoreFiles(folder)
    files.header.write_text(files.header.read_text().replace('"complete": true', '"complete": false'))
    done = data.draw(st.lists(st.integers(0, NUM_SHARDS - 1), unique=True))
    log = "".join(f"{unit}\n" for unit in done).encode()
    cut = data.draw(st.integers(0, len(log)))
    (folder / "done-1-0.log").write_bytes(log[:cut])
    if log[:cut].count(b"\n") == 0:
        files.tokens.write_bytes(b"\xff" * data.draw(st.integers(0, len(expected[0]))))
    report = write_store(config, Local())
    assert report.units_written == NUM_SHARDS - log[:cut].count(b"\n")
    assert contents(config) == expected
