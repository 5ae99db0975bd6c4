"""Small files that decode to large ones: refused before the memory is taken, when indexed and when read.

Each case runs in a process forked from this one, which measures by how much its own peak exceeds what it began with.
"""

import bz2
import ctypes
import gzip
import lzma
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import UserError
from mixtera_hpc.testing.mds import write_mds

pytestmark = pytest.mark.slow
"""Decodes up to 256 MiB per case."""

LIMIT = 256 << 20
PEAK_BYTES = 2 * LIMIT + (200 << 20)
"""Allowed peak above the memory with which a case begins; an interpreter with our packages has 200 MiB."""
BOMB_BYTES = 3 * LIMIT
PIECE = 1 << 20

Write = Callable[[Path], None]


def compressed_row(ending: str, one_frame: bool) -> Write:
    """Write one row of `BOMB_BYTES` as one frame, or as frames without the end of a line between them."""
    compress = {
        "gz": lambda data: gzip.compress(data, 1),
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor().compress,
    }[ending]

    def write(folder: Path) -> None:
        head, tail = b'{"text": "', b'"}\n'
        with (folder / f"bomb.jsonl.{ending}").open("wb") as file:
            if one_frame:
                file.write(compress(head + b"a" * BOMB_BYTES + tail))
            else:
                file.write(compress(head) + compress(b"a" * PIECE) * (BOMB_BYTES // PIECE) + compress(tail))

    return write


def dictionary_parquet(folder: Path) -> None:
    """Write one text of 1 MB that a thousand rows share."""
    table = pa.table({"text": pa.array(["x" * PIECE] * (BOMB_BYTES // PIECE))})
    pq.write_table(table, folder / "bomb.parquet", compression="zstd")


def nested_parquet(folder: Path) -> None:
    """The same inside lists of structs."""
    values = pa.array([[{"text": "x" * PIECE}] * 4] * (BOMB_BYTES // PIECE // 4))
    pq.write_table(pa.table({"text": pa.array(["x"] * len(values)), "turns": values}), folder / "bomb.parquet")


def delta_parquet(folder: Path) -> None:
    """Write texts that each repeat the one before."""
    table = pa.table({"text": pa.array(["x" * PIECE] * (BOMB_BYTES // PIECE))})
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    pq.write_table(table, folder / "bomb.parquet", use_dictionary=False, column_encoding=encoding)


def lying_parquet(folder: Path) -> None:
    """Write pages that decode to more than the footer says."""
    text = "x" * (BOMB_BYTES // 8)
    table = pa.table({"text": pa.array([f"{number}{text}" for number in range(8)])})
    path = folder / "bomb.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    metadata = pq.read_metadata(path).row_group(0)
    for size in {metadata.total_byte_size, metadata.column(0).total_uncompressed_size}:
        data = data.replace(_zigzag(size), _zigzag(size - BOMB_BYTES + 1000, len(_zigzag(size))))
    path.write_bytes(data)


def _zigzag(value: int, width: int = 0) -> bytes:
    """Encode a number as Thrift's compact protocol does, at least `width` bytes long."""
    value <<= 1
    encoded = bytearray()
    while value >= 0x80 or len(encoded) + 1 < width:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def compressed_arrow(folder: Path) -> None:
    write_arrow(folder, pa.table({"text": ["x" * (LIMIT // 2)] * 6}), stream=False)


def compressed_arrow_stream(folder: Path) -> None:
    write_arrow(folder, pa.table({"text": ["x" * (LIMIT // 2)] * 6}), stream=True)


def dictionary_arrow(folder: Path) -> None:
    indices = pa.array(np.zeros(BOMB_BYTES // PIECE, np.int32))
    write_arrow(folder, pa.table({"text": pa.DictionaryArray.from_arrays(indices, ["x" * PIECE])}), stream=False)


def view_arrow(folder: Path) -> None:
    """Write views that all lead to the same bytes."""
    count = BOMB_BYTES // PIECE
    one = pa.array(["x" * PIECE], pa.string_view())
    views = np.tile(np.frombuffer(one.buffers()[1], np.uint8)[:16], count)
    buffers = [None, pa.py_buffer(views.tobytes()), *one.buffers()[2:]]
    column = pa.Array.from_buffers(pa.string_view(), count, buffers)
    write_arrow(folder, pa.table({"text": column}), stream=False)


def write_arrow(folder: Path, table: pa.Table, *, stream: bool) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(folder / "bomb.arrow"), table.schema, options=options) as file:
        file.write_table(table)


def compressed_mds(folder: Path) -> None:
    write_mds(folder, {"text": "str"}, [[{"text": b"x" * BOMB_BYTES}]], "zstd")


def long_line(folder: Path) -> None:
    """Write a line of zeros that the disk does not hold."""
    with (folder / "bomb.jsonl").open("wb") as file:
        file.write(b'{"text": "x"}\n')
        file.truncate(BOMB_BYTES)


def long_array(folder: Path) -> None:
    with (folder / "bomb.json").open("wb") as file:
        file.truncate(BOMB_BYTES)


def long_text(folder: Path) -> None:
    with (folder / "bomb.txt").open("wb") as file:
        file.truncate(BOMB_BYTES)


def long_member(folder: Path) -> None:
    """Write an archive with a member that the disk does not hold."""
    import tarfile

    member = tarfile.TarInfo("a.txt")
    member.size = BOMB_BYTES
    with (folder / "bomb.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(BOMB_BYTES + 4096)


def long_name(folder: Path) -> None:
    """Write an archive with a name that the disk does not hold."""
    import tarfile

    member = tarfile.TarInfo("././@LongLink")
    member.size = BOMB_BYTES
    member.type = tarfile.GNUTYPE_LONGNAME
    with (folder / "bomb.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(BOMB_BYTES + 4096)


CASES: dict[str, tuple[Write, list[str]]] = {
    **{f"{ending}, one frame": (compressed_row(ending, True), []) for ending in ("gz", "zst")},
    **{f"{ending}, many frames": (compressed_row(ending, False), []) for ending in ("gz", "bz2", "xz", "zst")},
    "Parquet, dictionary": (dictionary_parquet, []),
    "Parquet, dictionary in lists": (nested_parquet, ["data.properties.t=turns.text"]),
    "Parquet, delta": (delta_parquet, []),
    "Parquet, wrong footer": (lying_parquet, []),
    "Arrow, compressed": (compressed_arrow, []),
    "Arrow, compressed stream": (compressed_arrow_stream, []),
    "Arrow, dictionary": (dictionary_arrow, []),
    "Arrow, views": (view_arrow, []),
    "MDS, compressed": (compressed_mds, []),
    "a long line": (long_line, []),
    "a long array": (long_array, ["data.format=json", "data.include=['*.json']"]),
    "a long text": (long_text, ["data.format=text", "data.include=['*.txt']"]),
    "a long member": (long_member, ["data.text=txt"]),
    "a long name": (long_name, ["data.text=txt"]),
}
READ_CASES = [
    *("gz, one frame", "xz, many frames", "zst, one frame", "Parquet, dictionary", "Parquet, wrong footer"),
    *("Arrow, compressed", "Arrow, dictionary", "MDS, compressed"),
]
"""Those with a valid row, so that an index of them can be built with a higher limit."""
FAST_READ_CASES = ["gz, one frame", "Parquet, dictionary", "Arrow, compressed"]


def in_fork(log: Path, action: Callable[[], int]) -> tuple[int, int]:
    """Return the exit code of an action in a forked process, and the bytes by which its peak exceeds its beginning."""
    sys.stdout.flush()
    peak_file = log.with_suffix(".peak")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None).malloc_trim(0)  # What earlier tests freed must not serve the action.
            Path("/proc/self/clear_refs").write_text("5")  # Begin to measure the peak.
            start = memory_kb("VmRSS")
            with log.open("w") as file, redirect_stderr(file):
                try:
                    code = action()
                except UserError as error:
                    print(error, file=file)
                    code = 2
                except BaseException:
                    traceback.print_exc(file=file)
            peak_file.write_text(str(memory_kb("VmHWM") - start))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(peak_file.read_text()) * 1024


def memory_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def words_of(case: str, folder: Path, limit: int) -> list[str]:
    words = [f"data.root={folder / 'data'}", f"index.path={folder / 'i.h5'}", f"data.max_block_bytes={limit}"]
    return [*words, "mixture.unit=samples", "dataplane.global_batch_size=1", "dataplane.workers=0", *CASES[case][1]]


@pytest.mark.parametrize("case", CASES)
def test_a_bomb_is_refused_before_it_takes_memory(case: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    in_fork(tmp_path / "writer", lambda: CASES[case][0](tmp_path / "data") or 0)
    code, peak = in_fork(tmp_path / "log", lambda: main(["index", "build", *words_of(case, tmp_path, LIMIT)]))
    text = (tmp_path / "log").read_text()
    assert code == 2, text
    assert "data.max_block_bytes" in text or "is damaged" in text
    assert "bomb" in text or ".mds" in text
    assert peak <= PEAK_BYTES, f"{peak >> 20} MiB"


@pytest.mark.parametrize(
    "case", [case if case in FAST_READ_CASES else pytest.param(case, marks=pytest.mark.full) for case in READ_CASES]
)
def test_a_run_refuses_what_a_build_with_a_higher_limit_accepted(case: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    in_fork(tmp_path / "writer", lambda: CASES[case][0](tmp_path / "data") or 0)
    # The files are read, and not a row store of them.
    build = [*words_of(case, tmp_path, 8 * LIMIT), "data.materialize=never"]
    code, _ = in_fork(tmp_path / "log", lambda: main(["index", "build", *build]))
    assert code == 0, (tmp_path / "log").read_text()

    def read() -> int:
        with DataPlane.open(compose([*words_of(case, tmp_path, LIMIT), "data.materialize=never"]), Local()) as plane:
            next(iter(plane))
        return 0

    code, peak = in_fork(tmp_path / "log", read)
    text = (tmp_path / "log").read_text()
    assert code == 2, text
    assert "data.max_block_bytes=268435456" in text
    assert peak <= PEAK_BYTES, f"{peak >> 20} MiB"


def test_an_index_with_a_huge_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "x"}\n')
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]
    assert main(["index", "build", *words]) == 0
    with h5py.File(tmp_path / "i.h5", "r+") as file:
        del file["blocks/offset"]
        file.create_dataset("blocks/offset", (BOMB_BYTES,), "i8", compression="gzip", chunks=(PIECE,))
    small = f"data.max_block_bytes={LIMIT}"
    code, peak = in_fork(tmp_path / "log", lambda: main(["index", "inspect", *words, small]))
    text = (tmp_path / "log").read_text()
    assert code == 2, text
    assert peak <= PEAK_BYTES, f"{peak >> 20} MiB"
