"""Files that are no shards of their format as a whole: fault × format × {build, verify, query, run, samples}."""

import io
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.testing.writers import (
    write_arrow,
    write_compressed,
    write_json,
    write_jsonl,
    write_mds_rows,
    write_parquet,
    write_tar,
)

Answers = Callable[..., dict[str, str]]
GOOD = b'{"text": "a good row"}\n' * 3
BINARY = [
    *("parquet", "pq", "arrow", "feather", "tar", "mds", "mds.zstd", "json"),
    *("jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "bin"),
]
INCLUDE = ["**/*", "*.{jsonl,txt,json}"]
POINTERS = {
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s12345--4d7a.parquet\n", "git annex get"),
}
# All actions over the good shard alone.
THREE_GOOD = {"verify": "fresh", "query": "3 samples", "samples": "3 served"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    return folder


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if path.suffix == ".bin":
        path.with_suffix(".idx").write_bytes(b"")


@pytest.mark.parametrize("ending", BINARY)
def test_a_file_of_0_bytes_is_refused_or_counted(ending: str, data: Path, answers: Answers) -> None:
    put(data / f"b.{ending}", b"")
    refused = answers(include=INCLUDE)["build"]
    # The .idx file decides whether a .bin file may be empty.
    expected = "b.idx has 0 bytes" if ending == "bin" else f"b.{ending} has 0 bytes, which is no valid file"
    assert refused.startswith("DataError") and expected in refused
    skipped = answers(include=INCLUDE, on_bad_sample="skip")
    assert skipped["build"] == "3 samples, 0 bad rows, 1 damaged"
    assert skipped.items() >= THREE_GOOD.items()


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "txt"])
def test_a_file_of_lines_or_text_may_be_empty(ending: str, data: Path, answers: Answers) -> None:
    put(data / f"b.{ending}", b"")
    answered = answers(include=INCLUDE)
    assert answered["build"] == "3 samples, 0 bad rows, 0 damaged"
    assert answered.items() >= THREE_GOOD.items()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *((kind, ending) for kind in POINTERS for ending in ("parquet", "jsonl")),
        *(pytest.param(kind, ending, marks=pytest.mark.full) for kind in POINTERS for ending in [*BINARY[1:-1], "txt"]),
    ],
)
def test_a_pointer_is_called_a_pointer(kind: str, ending: str, data: Path, answers: Answers) -> None:
    content, command = POINTERS[kind]
    put(data / f"b.{ending}", content)
    refused = answers(include=INCLUDE)["build"]
    assert f"b.{ending} is {kind}, not the file itself.\n  Fetch the file with {command}" in refused
    skipped = answers(include=INCLUDE, on_bad_sample="skip")
    assert skipped["build"] == "3 samples, 0 bad rows, 1 damaged"
    assert skipped.items() >= THREE_GOOD.items()


def tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"{}"))


@pytest.mark.parametrize(
    ("order", "text", "on_bad_sample"),
    [
        (["jpg", "txt", "json"], "txt", "fail"),
        (["txt", "json", "jpg"], None, "skip"),
        pytest.param(["txt", "json", "jpg"], "txt", "skip", marks=pytest.mark.full),
        pytest.param(["jpg", "txt", "json"], None, "fail", marks=pytest.mark.full),
    ],
)
def test_members_that_are_not_next_to_each_other_are_refused(
    order: list[str], text: str | None, on_bad_sample: str, data: Path, answers: Answers
) -> None:
    (data / "a.jsonl").unlink()
    tar(data / "a.tar", [f"{key}.{ending}" for ending in order for key in "012"])
    refused = answers(text=text, on_bad_sample=on_bad_sample)["build"]
    assert "a.tar: the members of sample '0' are not next to each other" in refused and "tar --sort=name" in refused
    tar(data / "a.tar", [f"{key}.{ending}" for key in "012" for ending in order])
    assert answers(text=text)["samples"] == "3 served"


def test_a_data_set_without_readable_rows_is_refused(data: Path, answers: Answers) -> None:
    (data / "code").mkdir()
    (data / "code/a.jsonl").write_bytes(b'{"text": 1}\n')
    sets = {"web": {"root": str(data), "include": ["*.jsonl"]}, "code": {"root": str(data / "code")}}
    refused = answers(root="", sets=sets, on_bad_sample="skip")["build"]
    assert "shards of data.sets.code below" in refused and "a.jsonl: 1, Expected `str`, got `int`" in refused


WRITERS: dict[str, Callable[..., list[Path]]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "jsonl.gz": partial(write_compressed, ending="gz"),
    "jsonl.zst": partial(write_compressed, ending="zst"),
    "jsonl.bz2": partial(write_compressed, ending="bz2"),
    "jsonl.xz": partial(write_compressed, ending="xz"),
    "parquet": write_parquet,
    "arrow": write_arrow,
    "webdataset": write_tar,
    "mds": write_mds_rows,
    "mds.zstd": partial(write_mds_rows, compression="zstd"),
}
FURTHER = {"json", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "mds.zstd"}
"""Formats whose refresh takes the way of another format."""
ROWS = [{"text": f"row {i}", "meta": {"language": "en"}, "tags": ["x"]} for i in range(9)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in FURTHER else []) for name in WRITERS]
)
def test_a_refresh_accepts_the_same_content_at_another_time(
    name: str, tmp_path: Path, answers: Answers, tiny_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (path,) = WRITERS[name](tmp_path / "data", ROWS)
    text = "txt" if name == "webdataset" else "text"
    assert answers(text, include=[path.name])["run"].endswith("served")
    before = (tmp_path / "i.h5").read_bytes()
    with open_index(tmp_path / "i.h5") as index:
        fingerprint = index.fingerprint

    os.utime(path, ns=(1, 1))
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]
    built = [*words, f"data.text={text}", f"data.include=['{path.name}']", "index.block_rows=4"]
    built.append(f"dataplane.tokenizer={tiny_tokenizer}")
    assert main(["index", "verify", *words]) == 2
    assert "(changed since, same size)" in capsys.readouterr().err
    assert main(["index", "verify", "--deep", *words]) == 0
    assert "1 shard with the same content but another modification time" in capsys.readouterr().out
    assert main(["index", "refresh", *built]) == 0
    assert "no content has changed in 1 shard" in capsys.readouterr().out
    assert main(["index", "verify", *words]) == 0
    with open_index(tmp_path / "i.h5") as index:
        assert index.fingerprint == fingerprint
    assert (tmp_path / "i.h5").read_bytes() != before

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["index", "verify", "--deep", *words]) == 2


def test_a_failed_build_says_so_to_those_who_look_for_the_index(
    data: Path, answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "b.jsonl").write_bytes(b"{}\n")
    answers()
    assert main(["query", f"data.root={data}", f"index.path={tmp_path / 'i.h5'}"]) == 2
    error = capsys.readouterr().err
    assert "the last build failed.\n    DataError: " in error and "row=0: Object missing required field" in error
    (data / "b.jsonl").unlink()
    assert answers()["query"] == "3 samples"


def test_a_touched_file_of_0_bytes_stays_fresh(data: Path, answers: Answers) -> None:
    put(data / "b.parquet", b"")
    answers(on_bad_sample="skip")
    os.utime(data / "b.parquet", ns=(1, 1))
    assert answers(on_bad_sample="skip")["verify"] == "fresh"
