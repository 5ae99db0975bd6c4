"""Damaged or malformed data files: `index build` exits with code 2 and names the file, the place and a remedy."""

import bz2
import errno
import functools
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.cli.main import main
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import UserError
from mixtera_hpc.formats.shard_errors import cannot_open_error
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.testing.writers import json_lines, write_arrow, write_parquet, write_tar

pytestmark = pytest.mark.slow
"""Decodes decompression bombs up to their limit."""

Make = Callable[[Path], None]
"""Writes a bad file into a folder."""
ROWS = [{"text": f"text {i} " * 20, "meta": {"language": "en", "quality": 0.5}, "tags": ["a"]} for i in range(300)]
LINES = b"".join(json_lines(ROWS))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def jsonl(*lines: str | bytes) -> Make:
    """Write these lines after a good one."""
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    data = b"\n".join([b'{"text": "good"}', *encoded])
    return lambda folder: put(folder / "bad.jsonl", data)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def truncated(write: Callable[[Path, Any], list[Path]], fraction: float) -> Make:
    """Write a good file and keep this fraction of its bytes."""

    def make(folder: Path) -> None:
        (path,) = write(folder, ROWS)
        data = path.read_bytes()
        path.rename(path.with_stem("bad")).write_bytes(data[: int(fraction * len(data))])

    return make


def compressed(ending: str, change: Callable[[bytes], bytes]) -> Make:
    """Write a good compressed file with its bytes changed."""
    return lambda folder: put(folder / f"bad.jsonl.{ending}", change(COMPRESS[ending](LINES)))


def tar(*members: tuple[str, bytes], end_mark: bool = True, flip: int | None = None) -> Make:
    """Write an archive, without its end mark or with the byte `flip` inverted."""

    def make(folder: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            end = archive.offset
        data = bytearray(buffer.getvalue() if end_mark else buffer.getvalue()[:end])
        if flip is not None:
            data[flip] ^= 0xFF
        put(folder / "bad.tar", bytes(data))

    return make


def megatron(change: Callable[[Path], None], ids: Any = ((1, 2), (3,))) -> Make:
    """Write a Megatron file and change it or its index."""

    def make(folder: Path) -> None:
        write_megatron(folder / "bad.bin", ids)
        change(folder)

    return make


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a function that changes the bytes of a file."""
    return lambda folder: put(folder / name, change((folder / name).read_bytes()))


TAR_TEXT = ["data.text=txt"]
IDS = ["dataplane.vocab_size=100"]
GOOD_TXT = ("a.txt", b"good")
# Name → (how to write the bad file, overrides, pattern of the message).
CASES: dict[str, tuple[Make, list[str], str]] = {
    "broken JSON": (jsonl('{"text": "x'), [], r"row=1: Input data was truncated"),
    "a value of another type": (jsonl('{"text": 3}'), [], r"row=1: Expected `str`, got `int`"),
    "a value of another kind than its property": (
        jsonl('{"text": "x", "q": "high"}'),
        ["data.properties.q={path:q,kind:number}"],
        r"row=1: Expected `float \| null`, got `str` - at `\$\.q`",
    ),
    "a missing field": (jsonl("{}"), [], "row=1: Object missing required field `text`"),
    "invalid UTF-8": (jsonl(b'{"text": "\xff"}'), [], "row=1: 'utf-8' codec can't decode"),
    "NUL bytes": (jsonl(b'{"text": "\0"}'), [], "row=1: JSON is malformed: invalid character"),
    "a hole of NUL bytes": (jsonl(b"\0" * 5000), [], "row=1: JSON is malformed"),
    "only empty files": (lambda folder: put(folder / "bad.jsonl", b""), [], "hold no rows"),
    **{
        f".{e} cut off": (compressed(e, lambda data: data[: len(data) // 2]), [], "ends inside a compressed frame")
        for e in COMPRESS
    },
    **{
        f"plain text named .{e}": (compressed(e, lambda _: b"plain text, no frame at all"), [], "near byte")
        for e in COMPRESS
    },
    **{
        f"trailing bytes after .{e}": (compressed(e, lambda d: d + b"junk"), [], "cannot be decompressed")
        for e in COMPRESS
    },
    **{
        f"damage inside .{e}": (compressed(e, lambda d: d[:400] + bytes(99) + d[499:]), [], "bad.jsonl")
        for e in COMPRESS
    },
    **{
        f"a .{e} bomb": (
            lambda folder, e=e: put(folder / f"bad.jsonl.{e}", COMPRESS[e](b" " * 3_000_000)),
            ["data.max_block_bytes=1000000"],
            r"begins at byte 0 decodes to more than data\.max_block_bytes=1000000",
        )
        for e in COMPRESS
    },
    "a line that is too long": (
        jsonl('{"text": "' + "x" * 3_000_000 + '"}'),
        ["data.max_block_bytes=1000000"],
        r"the line that begins at byte 17 has more than data\.max_block_bytes=1000000 bytes",
    ),
    "a JSON array that is too long": (
        lambda f: put(f / "bad.json", b'[{"text": "' + b"x" * 3_000_000 + b'"}]'),
        ["data.max_block_bytes=1000000", "data.include=[bad.json]"],
        r"is one JSON array of 3000014 bytes, more than data\.max_block_bytes=1000000",
    ),
    "Parquet cut off": (truncated(write_parquet, 0.7), [], "not a readable Parquet file"),
    "plain bytes named .parquet": (lambda f: put(f / "bad.parquet", b"x" * 500), [], "not a readable Parquet file"),
    "an Arrow file cut off": (truncated(write_arrow, 0.7), [], "not a readable Arrow file"),
    "plain bytes named .arrow": (lambda f: put(f / "bad.arrow", b"x" * 500), [], "not a readable Arrow file"),
    "an empty Arrow file": (lambda f: put(f / "bad.arrow", b"ARROW1"), [], "not a readable Arrow file"),
    "Feather of version 1": (lambda f: put(f / "bad.feather", b"FEA1" + bytes(100)), [], "Feather of version 1"),
    "an Arrow file without text": (
        lambda f: write_arrow(f, [{"body": "x"}])[0].rename(f / "bad.arrow"),
        [],
        "has no column 'text', which data.text names. Its columns are: body",
    ),
    "a tar cut off": (
        truncated(write_tar, 0.503),
        TAR_TEXT,
        r"is damaged: it ends inside member '\d+\.\w+', which begins at byte",
    ),
    "a tar without its end": (tar(GOOD_TXT, end_mark=False), TAR_TEXT, "ends at byte 1024 without an end mark"),
    "a tar header with a wrong checksum": (tar(GOOD_TXT, flip=3), TAR_TEXT, "there is no valid header at byte 0"),
    "plain bytes named .tar": (
        lambda f: put(f / "bad.tar", b"x" * 9999),
        TAR_TEXT,
        "there is no valid header at byte 0",
    ),
    "a member above the archive": (
        tar(("../../up.txt", b"x")),
        TAR_TEXT,
        r"named '\.\./\.\./up\.txt', which points out",
    ),
    "a member with an absolute name": (
        tar(("/etc/passwd.txt", b"x")),
        TAR_TEXT,
        "named '/etc/passwd.txt', which points",
    ),
    "two members of one name": (
        tar(GOOD_TXT, GOOD_TXT),
        TAR_TEXT,
        "row=0: sample 'a' has two members with ending 'txt'",
    ),
    "a sample without text": (
        tar(GOOD_TXT, ("b.jpg", b"x")),
        TAR_TEXT,
        "row=1: sample 'b' has no member for data.text=txt; it has jpg",
    ),
    "broken JSON in a tar": (
        tar(GOOD_TXT, ("a.json", b'{"x": ')),
        [*TAR_TEXT, "data.properties.x=json.x"],
        r"row=0: member a\.json: Input data was truncated",
    ),
    "a caption that is not UTF-8": (tar(("a.txt", b"\xff")), TAR_TEXT, r"row=0: member a\.txt: 'utf-8' codec"),
    "a sample that is too long": (
        tar(GOOD_TXT, ("b.jpg", bytes(200_000))),
        [*TAR_TEXT, "data.max_block_bytes=100000"],
        r"sample 'b' has \d+ bytes, more than data\.max_block_bytes",
    ),
    "an .idx cut off": (
        megatron(rewritten("bad.idx", lambda d: d[:-5])),
        IDS,
        r"bad\.idx is truncated: it has \d+ bytes",
    ),
    "an .idx that goes on": (
        megatron(rewritten("bad.idx", lambda d: d + b"more")),
        IDS,
        r"bad\.idx is too long: it has \d+ bytes",
    ),
    "an .idx of 0 bytes": (megatron(rewritten("bad.idx", lambda d: b"")), IDS, r"bad\.idx has 0 bytes"),
    "an .idx of three bytes": (
        megatron(rewritten("bad.idx", lambda d: d[:3])),
        IDS,
        "is not the index of a Megatron file",
    ),
    "an .idx of another format": (megatron(rewritten("bad.idx", lambda d: b"TNTIDX" + d[6:])), IDS, "magic b'TNTIDX"),
    "an .idx of floats": (megatron(rewritten("bad.idx", lambda d: d[:17] + b"\7" + d[18:])), IDS, "type code 7"),
    "no .idx": (megatron(lambda f: (f / "bad.idx").unlink()), IDS, "needs bad.idx beside it"),
    "a .bin cut off": (
        megatron(rewritten("bad.bin", lambda d: d[:-2])),
        IDS,
        "has 4 bytes, but its .idx file describes 6",
    ),
    "ids of another vocabulary": (
        megatron(lambda f: None, [[1], [2, 500]]),
        IDS,
        "row=1: id 500 in a vocabulary of 100",
    ),
    "a sidecar with too few lines": (
        megatron(lambda f: put(f / "bad.sidecar.jsonl", b'{"s": "x"}\n')),
        [*IDS, "data.properties.s=s"],
        r"bad\.sidecar\.jsonl has 1 lines, but bad\.bin has 2 documents",
    ),
    "a broken sidecar": (
        megatron(lambda f: put(f / "bad.sidecar.jsonl", b"{}\noops\n")),
        [*IDS, "data.properties.s=s"],
        r"bad\.sidecar\.jsonl' row=1: JSON is malformed",
    ),
    "texts without a tokenizer": (
        lambda f: put(f / "bad.jsonl", LINES),
        IDS,
        "A shard holds text, but dataplane.vocab_size is set",
    ),
    "text that is not UTF-8": (
        lambda f: put(f / "bad.txt", b"abc\xff"),
        ["data.include=['*.txt']"],
        "row=0: not UTF-8: invalid start byte at byte 3",
    ),
    "binary data named .txt": (
        lambda f: put(f / "bad.txt", b"ELF\0\1"),
        ["data.include=['*.txt']"],
        "row=0: a NUL character at byte 3",
    ),
    "an array cut off": (
        lambda f: put(f / "bad.json", json.dumps(ROWS).encode()[:-9]),
        ["data.include=['*.json']"],
        "is not a JSON array of rows: Input data was truncated",
    ),
    "JSON lines named .json": (
        lambda f: put(f / "bad.json", LINES),
        ["data.include=['*.json']"],
        "Set data.format=jsonl if it has one row per line",
    ),
    "an array with a number in it": (
        lambda f: put(f / "bad.json", b'[{"text": "x"}, 7]'),
        ["data.include=['*.json']"],
        "row=1: Expected `object`, got `int`",
    ),
}


@functools.cache
def composed(*overrides: str) -> Config:
    return compose_data(["data.root=/data", "index.path=/index.h5", *overrides])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_its_file_and_place(case: str, tmp_path: Path) -> None:
    make, overrides, message = CASES[case]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    config = composed(*overrides)
    data = replace(config.data, root=str(tmp_path / "data"))
    index = replace(config.index, path=str(tmp_path / "i.h5"))
    with pytest.raises(UserError) as caught:
        build_index(replace(config, data=data, index=index))
    output = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, output), output
    names_file = "bad" in output or "hold no rows" in output or "A shard holds text" in output
    assert names_file, "the file is named"
    assert not (tmp_path / "i.h5").exists()


def test_bad_input_exits_with_code_2_and_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "bad.jsonl", b'{"text": "good"}\n{"text": 3}\n')
    assert main(["index", "build", f"data.root={tmp_path}", f"index.path={tmp_path / 'index.h5'}"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("DataError: ")
    assert "row=1: Expected `str`, got `int`" in output
    assert "Traceback" not in output


def test_a_tar_is_never_extracted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tar(("../escaped.txt", b"x"), ("sub/ok.txt", b"y"))(tmp_path / "data")
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}", *TAR_TEXT]
    assert main(["index", "build", *words]) == 2
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["bad.tar"]
    assert not (tmp_path / "escaped.txt").exists()


def test_a_line_of_twenty_megabytes_is_read(tmp_path: Path) -> None:
    rows = [{"text": "short"}, {"text": "x" * 20_000_000}, {"text": "last"}]
    (tmp_path / "data").mkdir()
    put(tmp_path / "data/a.jsonl", b"".join(json_lines(rows)))
    put(tmp_path / "data/b.jsonl.zst", zstandard.compress(b"".join(json_lines(rows))))
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}"]
    assert main(["index", "build", *words]) == 0

    with open_index(tmp_path / "index.h5") as index:
        assert index.tables.num_samples == 6
        assert np.array_equal(index.tables.shards.rows, [3, 3])


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "denied[^$]*Let the user of the job read the file",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory[^$]*ulimit -v[^$]*max_map_count"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "No such file[^$]*mixtera-hpc index verify"),
    ],
)
def test_a_shard_that_cannot_be_opened_has_a_cure_for_the_reason(error: OSError, cure: str) -> None:
    assert re.search(cure, str(cannot_open_error(Path("a.jsonl"), error)))
