"""Opening an index, and reading samples without its tables."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.layout import VERSION
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.index.read.sample_reader import SampleReader


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an index of 1000 samples in blocks of 100; the last block of the last two shards is shorter."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in (("a", 700), ("b", 250), ("c", 50)):
        lines = [json.dumps({"text": "x" * i, "c": str(i % 3), "n": i}) for i in range(rows)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {"root": str(root), "properties": {"c": "c", "n": {"path": "n", "kind": "number"}}}
    config = {"data": data, "index": {"path": str(root / "index.h5"), "block_rows": 100}}
    return Path(build_index(from_plain(Config, config)).path)


def test_an_index_is_not_called_damaged_where_no_more_files_may_be_opened(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(PropertyIndexError, match=r"cannot be opened: Too many open files[^$]*ulimit -a"):
            open_index(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_reader_reads_blocks_without_the_tables(path: Path) -> None:
    index = open_index(path)
    reader = SampleReader(path)
    blocks = index.tables.blocks
    for b in range(len(blocks)):
        columns = reader.read(int(blocks.first_sample[b]), int(blocks.rows[b]))
        assert columns.numbers["n"].tolist() == list(range(blocks.first_row[b], blocks.first_row[b] + blocks.rows[b]))
        assert columns.length.sum() == blocks.length[b]
    reader.close()
    index.close()


def test_columns_have_the_promised_types(path: Path) -> None:
    with open_index(path) as index:
        columns = index.read_block(0)
    types = (columns.combo.dtype, columns.length.dtype, columns.tokens.dtype, columns.numbers["n"].dtype)
    assert types == (np.int32, np.int64, np.int64, np.float64)


def test_several_blocks_are_concatenated(path: Path) -> None:
    with open_index(path) as index:
        blocks = index.tables.blocks
        numbers = [7, 0, 9]
        columns = index.samples.read_many(blocks.first_sample[numbers].tolist(), blocks.rows[numbers].tolist())
        single = [index.read_block(b) for b in numbers]
        assert columns.combo.tolist() == [c for p in single for c in p.combo.tolist()]
        assert columns.numbers["n"].tolist() == [n for p in single for n in p.numbers["n"].tolist()]
        assert len(index.samples.read_many([], []).combo) == 0


def test_every_block_begins_a_chunk(path: Path) -> None:
    with open_index(path) as index, h5py.File(path) as file:
        assert (index.tables.blocks.first_sample % file["samples/combo"].chunks[0] == 0).all()


def test_a_reader_opens_the_file_at_the_first_read(path: Path, tmp_path: Path) -> None:
    reader = SampleReader(tmp_path / "later.h5")
    with pytest.raises(PropertyIndexError, match="There is no property index"):
        reader.read(0, 1)
    shutil.copy(path, tmp_path / "later.h5")
    assert len(reader.read(0, 10).combo) == 10
    reader.close()
    assert len(reader.read(0, 10).combo) == 10, "a closed reader opens again"
    reader.close()


def test_threads_share_a_reader(path: Path) -> None:
    with open_index(path) as index, ThreadPoolExecutor(8) as pool:
        firsts = list(pool.map(lambda b: index.read_block(b % 11).numbers["n"][0], range(200)))
        assert firsts == [index.tables.blocks.first_row[b % 11] for b in range(200)]


def test_an_open_index_can_be_replaced(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "index.h5"
    other = tmp_path / "other.h5"
    shutil.copy(path, copy)
    with open_index(copy) as index:
        before = index.read_block(3).length.tolist()
        other.write_bytes(b"something else")
        other.replace(copy)
        assert index.read_block(3).length.tolist() == before


def test_the_tables_stay_usable_after_close(path: Path) -> None:
    with open_index(path) as index:
        pass
    assert index.tables.num_samples == 1000


def test_the_data_root_can_be_moved(path: Path) -> None:
    assert open_index(path).data_root == path.parent
    assert open_index(path, "/elsewhere").data_root == Path("/elsewhere")


def test_a_missing_index_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(
        PropertyIndexError, match=r"no property index at (.|\n)*mixtera-hpc index build, or set index\.path"
    ):
        open_index(tmp_path / "none.h5")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n", b"\0" * 5000])
def test_a_file_that_is_not_hdf5_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.h5").write_bytes(content)
    with pytest.raises(PropertyIndexError, match="is damaged or truncated"):
        open_index(tmp_path / "i.h5")


def test_an_hdf5_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "i.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(PropertyIndexError, match="is not a property index"):
        open_index(tmp_path / "i.h5")


def test_another_version_is_refused_by_number(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "i.h5")
    with h5py.File(tmp_path / "i.h5", "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(PropertyIndexError, match=f"has version 99, but this is version {VERSION}"):
        open_index(tmp_path / "i.h5")


def _link_elsewhere(file: h5py.File) -> None:
    del file["blocks/rows"]
    file["blocks/rows"] = h5py.ExternalLink("/etc/other.h5", "/rows")


def _link_inside(file: h5py.File) -> None:
    del file["blocks/rows"]
    file["blocks/rows"] = h5py.SoftLink("/blocks/length")


def _make_virtual(file: h5py.File) -> None:
    length = len(file["blocks/rows"])
    layout = h5py.VirtualLayout(shape=(length,), dtype="i8")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "rows", shape=(length,))
    del file["blocks/rows"]
    file.create_virtual_dataset("blocks/rows", layout)


def _store_outside(file: h5py.File) -> None:
    length = len(file["blocks/rows"])
    del file["blocks/rows"]
    file.create_dataset("blocks/rows", (length,), "i8", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_link_elsewhere, "a link at /blocks/rows"),
        (_link_inside, "a link at /blocks/rows"),
        (_make_virtual, "a virtual dataset at /blocks/rows"),
        (_store_outside, "external storage at /blocks/rows"),
    ],
)
def test_a_file_that_would_read_other_files_is_refused(
    path: Path, tmp_path: Path, change: Callable[[h5py.File], None], found: str
) -> None:
    copy = tmp_path / "copy.h5"
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        change(file)
    with pytest.raises(PropertyIndexError, match=rf"copy\.h5 holds {found}, so that opening it would read other files"):
        open_index(copy)
    with pytest.raises(PropertyIndexError, match="would read other files"):
        SampleReader(copy).read(0, 1)


LOCKED = """
import fcntl, sys
from pathlib import Path
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.open_file import open_file
from mixtera_hpc.index.read.stored_sizes import column_sizes

path = Path(sys.argv[1])
with path.open("rb+") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    for read in (open_file, column_sizes):
        try:
            read(path)
        except PropertyIndexError as error:
            print(error)
"""


def test_a_file_that_cannot_be_locked_is_not_called_damaged(own_collection: list[str]) -> None:
    path = next(word.partition("=")[2] for word in own_collection if word.startswith("index.path="))
    command = [sys.executable, "-c", LOCKED, path]

    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HDF5_USE_FILE_LOCKING": "TRUE"}, check=True
    )

    assert done.stdout.count("Set HDF5_USE_FILE_LOCKING=FALSE.") == 2
    assert "damaged" not in done.stdout
