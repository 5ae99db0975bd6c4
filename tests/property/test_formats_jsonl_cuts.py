"""Any division of a JSONL file into units, segments and blocks gives the same rows, which can be read again."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.formats.base import PropertyField, ScanSpec
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.jsonl import JsonlFormat
from mixtera_hpc.testing.format_cases import read_blocks

SPEC = ScanSpec(
    text="a.text", properties=(PropertyField(name="kind", path="a.kind", kind=Kind.CATEGORY),), documents=True
)
texts = st.one_of(st.text(max_size=12), st.text('x🙂{}"\\', max_size=300))
rows = st.tuples(texts, st.one_of(st.none(), st.text(max_size=3), st.integers(), st.booleans()))
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n\t\n", " \n"])


def value_set(kind: str | int | bool | None) -> tuple[str, ...]:
    """Return the value set that a category with this raw value has."""
    if kind is None:
        return ()
    return (str(kind).lower() if isinstance(kind, bool) else str(kind),)


@given(
    st.lists(st.tuples(rows, ends), max_size=40),
    st.sampled_from(["", "\n", "\n \n"]),
    st.booleans(),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_every_row_is_scanned_once_and_read_back(
    lines: list[tuple[tuple[str, str | int | bool | None], str]],
    head: str,
    ends_with_newline: bool,
    unit_bytes: int,
    segment_bytes: int,
    block_rows: int,
) -> None:
    encoded = [json.dumps({"z": [1], "a": {"text": t, "kind": k}}, ensure_ascii=False) + end for (t, k), end in lines]
    content = (head + "".join(encoded)).encode("utf-8", "strict")
    content = content if ends_with_newline else content.rstrip()
    fmt = JsonlFormat(unit_bytes=unit_bytes, segment_bytes=segment_bytes)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shard.jsonl"
        path.write_bytes(content)
        batches = [b for unit in fmt.units(path, len(content)) for b in fmt.scan(path, unit, SPEC, block_rows)]
        expected = [t for (t, _), _ in lines]
        assert [d for b in batches for d in b.documents or []] == expected
        assert sum(b.rows for b in batches) == len(expected)
        columns = [batch.columns["kind"] for batch in batches]
        kinds = [column.values[code] for column in columns if isinstance(column, Categories) for code in column.code]
        assert kinds == [value_set(kind) for (_, kind), _ in lines]
        reader = fmt.open(path, "a.text", BlockCache())
        documents = []
        for block, lengths in read_blocks(batches):
            assert block.rows <= block_rows and lengths.sum() == block.length
            documents += reader.documents(block, lengths, np.arange(block.rows))
            last = np.array([block.rows - 1])
            assert reader.documents(block, lengths, last) == expected[block.first_row + block.rows - 1 :][:1]
        reader.close()
        assert documents == expected
