"""Parquet: column types, nesting, statistics, and errors."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import PropertyField, ScanSpec
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.parquet import ParquetFormat
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import read_blocks, scan_whole_shard


def column(path: Path, kind: Kind, name: str = "p") -> list[Any]:
    """Return the values of one property in all rows."""
    spec = ScanSpec(text="text", properties=(PropertyField(name="x", path=name, kind=kind),))
    values: list[Any] = []
    for batch in scan_whole_shard(ParquetFormat(), path, spec):
        column = batch.columns["x"]
        if isinstance(column, Categories):
            values += [column.values[code] for code in column.code]
        else:
            values += column.tolist()
    return values


def write(folder: Path, values: Any, **more: Any) -> Path:
    path = folder / "shard.parquet"
    pq.write_table(pa.table({"text": ["t"] * len(values), "p": values}), path, **more)
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["b", None, "a", "b"]), [("b",), (), ("a",), ("b",)]),
        (pa.array(["b", None, "a"], pa.large_string()), [("b",), (), ("a",)]),
        (pa.array(["b", None, "b"]).dictionary_encode(), [("b",), (), ("b",)]),
        (pa.array([1, None, 2020]), [("1",), (), ("2020",)]),
        (pa.array([True, None, False]), [("true",), (), ("false",)]),
        (pa.array([0.5, None]), [("0.5",), ()]),
        (pa.array([datetime.date(2020, 1, 31), None]), [("2020-01-31",), ()]),
    ],
)
def test_scalars_become_categories(values: Any, expected: list[Any], tmp_path: Path) -> None:
    assert column(write(tmp_path, values), Kind.CATEGORY) == expected
    assert column(write(tmp_path, values), Kind.CATEGORIES) == expected


def test_lists_become_sets_of_categories(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array([["b", "a", "b"], [], None, ["a", None]]))
    assert column(path, Kind.CATEGORIES) == [("a", "b"), (), (), ("a",)]


@pytest.mark.parametrize("values", [pa.array([1, None, 3]), pa.array([1.0, None, 3.0], pa.float32())])
def test_numbers_are_float64_and_null_is_nan(values: Any, tmp_path: Path) -> None:
    assert np.array_equal(column(write(tmp_path, values), Kind.NUMBER), [1.0, np.nan, 3.0], equal_nan=True)


def test_dots_lead_into_structs_and_a_column_with_dots_takes_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array([{"q": {"r": "in"}}, None, {"q": None}]))
    assert column(path, Kind.CATEGORY, "p.q.r") == [("in",), (), ()]
    pq.write_table(pa.table({"text": ["t"], "p": [{"x": "in"}], "p.q": ["flat"]}), path)
    assert column(path, Kind.CATEGORY, "p.q") == [("flat",)]
    pq.write_table(pa.table({"text": ["t"], "p": [{"q": "in"}], "p.q": ["flat"]}), path)
    with pytest.raises(DataError, match=r"more than one meaning of the path 'p\.q': 'p\.q' and 'p' → 'q'"):
        column(path, Kind.CATEGORY, "p.q")


def test_a_missing_column_is_null(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array(["a", "b"]))
    assert column(path, Kind.CATEGORY, "other") == [(), ()]
    assert column(path, Kind.CATEGORY, "p.q") == [(), ()]
    assert np.isnan(column(path, Kind.NUMBER, "other")).all()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (pa.array(["high"]), Kind.NUMBER, "has type string, which cannot be read as the number"),
        (pa.array([True]), Kind.NUMBER, "has type bool, which cannot be read as the number"),
        (
            pa.array([["a"]]),
            Kind.CATEGORY,
            r"cannot be read as the category of data\.properties\.x\.\n  Set kind: categories",
        ),
        (pa.array([{"a": 1}]), Kind.CATEGORIES, "cannot be read as the categories"),
        (pa.array([[{"a": 1}]]), Kind.CATEGORIES, "cannot be read as the categories"),
        (pa.array([[["a"]]]), Kind.CATEGORIES, "cannot be read as the categories"),
    ],
)
def test_a_column_of_another_kind_is_refused(values: Any, kind: Kind, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        column(write(tmp_path, values), kind)


def test_row_groups_are_blocks_and_each_belongs_to_one_unit(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array([str(i) for i in range(100)]), row_group_size=7, use_dictionary=False)
    spec = ScanSpec(text="text", documents=True)
    footer = pq.read_metadata(path)
    begins = [footer.row_group(i).column(0).data_page_offset for i in range(15)]
    for unit_bytes in (300, 10**9, *begins[:5]):
        blocks = read_blocks(scan_whole_shard(ParquetFormat(unit_bytes=unit_bytes), path, spec))
        assert [(b.offset, b.rows) for b, _ in blocks] == [(i, 7) for i in range(14)] + [(14, 2)]


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_text_are_named_with_or_without_statistics(statistics: bool, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    texts = [None if i in (3, 8) else "t" for i in range(10)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=4, write_statistics=statistics)
    with pytest.raises(DataError) as caught:
        scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text"))
    assert [note.split("row=")[1].split(":")[0] for note in caught.value.__notes__] == ["3", "8"]


def test_a_file_without_the_text_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'body', which data\.text names\. Its columns are: text, p"):
        scan_whole_shard(ParquetFormat(), write(tmp_path, pa.array(["a"])), ScanSpec(text="body"))


def test_a_text_column_of_another_type_is_refused(tmp_path: Path) -> None:
    for values in (pa.array([1]), pa.array([["a"]])):
        with pytest.raises(DataError, match=r"column 'p', which data\.text names, has type .*; text is required"):
            scan_whole_shard(ParquetFormat(), write(tmp_path, values), ScanSpec(text="p"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match="has several columns 'text'"):
        scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text"))


def test_texts_that_are_not_utf8_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": [b"a", None, b"\xff", b"b"]}), path)
    with pytest.raises(DataError) as caught:
        scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text", documents=True))
    assert [note.split("row=")[1].split(":")[0] for note in caught.value.__notes__] == ["1", "2"]
    (batch,) = scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text", documents=True, skip_bad=True))
    assert batch.documents == ["a", "", "", "b"] and [row for row, _ in batch.bad] == [1, 2]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_string_views_are_read_as_texts(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"shard.{ending}"
    view = pa.string_view()
    rows = [{"text": f"text {i} " * i, "tags": ["a", "b"], "meta": {"source": "web"}} for i in range(9)]
    kinds = {"text": view, "tags": pa.large_list(view), "meta": pa.struct([("source", view)])}
    table = pa.Table.from_pylist(rows, pa.schema(kinds.items()))
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    reader = load_format(ending).open(path, "text", BlockCache())
    ((block, lengths),) = read_blocks(scan_whole_shard(load_format(ending), path, ScanSpec(text="text")))
    assert reader.documents(block, lengths, np.array([2, 7])) == [rows[2]["text"], rows[7]["text"]]
    assert reader.payloads(block, lengths, np.array([2, 7])) == [rows[2], rows[7]]
    reader.close()


def test_a_text_that_many_rows_share_counts_once_per_row(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": ["long " * 1000] * 100}), path)
    assert pq.read_metadata(path).row_group(0).total_byte_size < 10_000
    spec = ScanSpec(text="text", documents=True, max_block_bytes=100_000)
    with pytest.raises(
        DataError, match=r"row group 0 decodes to \d{6} bytes or more, beyond data\.max_block_bytes=100000"
    ):
        scan_whole_shard(ParquetFormat(), path, spec)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not parquet, but long enough to be looked at")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        scan_whole_shard(ParquetFormat(), tmp_path / "x.parquet", ScanSpec(text="text"))


def test_text_may_be_binary_or_dictionary_and_lie_in_a_struct(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    for text in (pa.array([b"a", "ü".encode()]), pa.array(["a", "ü"]).dictionary_encode()):
        pq.write_table(pa.table({"doc": pa.StructArray.from_arrays([text], ["text"])}), path)
        batches = scan_whole_shard(ParquetFormat(), path, ScanSpec(text="doc.text", documents=True))
        assert [d for b in batches for d in b.documents or []] == ["a", "ü"]
        reader = ParquetFormat().open(path, "doc.text", BlockCache())
        ((block, lengths),) = read_blocks(batches)
        assert reader.documents(block, lengths, np.array([1])) == ["ü"]
        reader.close()


def test_a_file_of_no_rows_has_no_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array([], pa.string()))
    assert read_blocks(scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text"))) == []


def test_a_shard_that_changed_is_refused_when_read(tmp_path: Path) -> None:
    path = write(tmp_path, pa.array(["a", "b"]))
    ((block, lengths),) = read_blocks(scan_whole_shard(ParquetFormat(), path, ScanSpec(text="text")))
    write(tmp_path, pa.array(["a", "b", "c"]))
    reader = ParquetFormat().open(path, "text", BlockCache())
    with pytest.raises(DataError, match="has changed since it was indexed"):
        reader.documents(block, lengths, np.array([0]))
    reader.close()
