"""Arrow files: damaged batches, dictionaries, and size limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef, ScanSpec
from mixtera_hpc.formats.batching.arrow.python_objects import BYTES_AT_ONCE, objects_at_once, payloads_of
from mixtera_hpc.formats.readers.arrow import ArrowFormat


def test_a_damaged_batch_fails_only_in_the_unit_that_owns_it(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    table = pa.table({"text": ["aaaa", "bbbb", "cccc"] * 2})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=3)
    content = path.read_bytes()
    offsets = np.array([0, 4, 8, 12], "<i4")
    damaged = content.replace(offsets.tobytes(), (offsets * [0, 99, 0, 1]).astype("<i4").tobytes(), 1)
    path.write_bytes(damaged)
    fmt = ArrowFormat(unit_bytes=len(content) // 2)
    first, second = fmt.units(path, len(content))[:2]
    with pytest.raises(DataError, match="record batch 0 cannot be read"):
        list(fmt.scan(path, first, ScanSpec(text="text", documents=True), 256))
    (batch,) = fmt.scan(path, second, ScanSpec(text="text", documents=True), 256)
    assert batch.documents == ["aaaa", "bbbb", "cccc"]


def test_a_null_entry_of_a_dictionary_is_a_missing_text(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    with pa.ipc.new_file(path, pa.schema({"text": texts.type})) as file:
        file.write_batch(pa.record_batch({"text": texts}))
    (unit,) = ArrowFormat().units(path, path.stat().st_size)
    (batch,) = ArrowFormat().scan(path, unit, ScanSpec(text="text", documents=True, skip_bad=True), 256)
    assert batch.documents == ["a", "", "a"] and batch.bad == ((1, "'text' is null"),)


@pytest.mark.parametrize(
    ("new", "message"), [(pa.ipc.new_file, "record batch 1"), (pa.ipc.new_stream, "it is a compressed stream, which")]
)
def test_a_batch_that_decodes_to_too_much_is_refused(new: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    table = pa.table({"text": ["short", "long " * 100_000]})
    for codec, is_refused in ((None, False), ("zstd", True)):
        with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
            file.write_table(table, max_chunksize=1)
        (unit,) = ArrowFormat().units(path, path.stat().st_size)
        scan = ArrowFormat().scan(path, unit, ScanSpec(text="text", max_block_bytes=100_000), 256)
        if is_refused:
            with pytest.raises(DataError, match=rf"{message} decodes to more than data\.max_block_bytes=100000"):
                list(scan)
        else:
            assert sum(batch.rows for batch in scan) == 2


def test_a_call_that_makes_objects_gets_few_large_rows() -> None:
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), pa.array(["x" * 2 * BYTES_AT_ONCE]))
    for num_bytes, expected in ((BYTES_AT_ONCE // 3, 2), (2 * BYTES_AT_ONCE, 1)):
        table = pa.table({"text": ["x" * num_bytes] * 100, "kind": dictionary})
        assert objects_at_once(table) == objects_at_once(table["text"]) == expected
        assert objects_at_once(table.slice(0, 0)) == 1
        small = table.select(["kind"])
        assert objects_at_once(small) >= 100
        groups = payloads_of(table, BlockRef(offset=0, length=0, first_row=0, rows=100), np.arange(5), Path())
        assert [[len(row["text"]) for row in rows] for rows in groups][:2] == [[num_bytes] * expected] * 2
