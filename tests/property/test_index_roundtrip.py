"""An index returns what its shards contain, in every format; and its bytes depend on the data alone."""

import gzip
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_tokenizer

Row = dict[str, Any]
ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
PROPERTIES = {
    "language": "meta.language",
    "tags": {"path": "tags", "kind": "categories"},
    "quality": {"path": "meta.quality", "kind": "number"},
}

texts = st.one_of(st.text(max_size=20), st.text("ab é🙂\n", min_size=0, max_size=2000))
names = st.one_of(st.none(), st.sampled_from(["en", "de"]), st.text(max_size=4))
rows = st.fixed_dictionaries(
    {
        "text": texts,
        "meta": st.fixed_dictionaries(
            {"language": names, "quality": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))}
        ),
        "tags": st.lists(st.text(max_size=3), max_size=3),
    }
)
shards = st.lists(st.lists(rows, max_size=20), min_size=1, max_size=3).filter(any)


def write(path: Path, rows: list[Row], ending: str, group: int) -> None:
    """Write a shard with a frame, or for Parquet a row group, per `group` rows."""
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    frames = [b"".join(lines[i : i + group]) for i in range(0, max(len(lines), 1), group)]
    if ending == "parquet":
        schema = pa.schema(
            {
                "text": pa.string(),
                "meta": pa.struct({"language": pa.string(), "quality": pa.float64()}),
                "tags": pa.list_(pa.string()),
            }
        )
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[ending]
        path.write_bytes(b"".join(map(compress, frames)))


def configured(root: Path, **more: Any) -> Config:
    data = {"root": str(root), "include": ["**/*"], "properties": PROPERTIES}
    return from_plain(Config, {"data": data, "index": {"path": str(root / "index.h5"), "block_rows": 4}} | more)


def samples_of(index: PropertyIndex) -> list[tuple[Any, ...]]:
    """Return (language, tags, quality, tokens) of every sample, in order."""
    tables = index.tables
    samples: list[tuple[Any, ...]] = []
    for block in range(len(tables.blocks)):
        columns = index.read_block(block)
        assert len(columns.combo) == tables.blocks.rows[block]
        for combo, quality, tokens in zip(columns.combo, columns.numbers["quality"], columns.tokens, strict=True):
            values = [tables.combos.values(name, combo) for name in ("language", "tags")]
            samples.append((*values, None if np.isnan(quality) else float(quality), int(tokens)))
    return samples


def documents_of(index: PropertyIndex) -> list[str]:
    """Read the text of every sample from the shards, in order."""
    blocks = index.tables.blocks
    shards = index.tables.shards
    texts: list[str] = []
    for block in range(len(blocks)):
        shard = int(blocks.shard[block])
        reader = load_format(shards.format[shard]).open(index.data_root / shards.path[shard], index.text, BlockCache())
        place = BlockRef.of(blocks, block)
        texts += reader.documents(place, index.read_block(block).length, np.arange(place.rows))
        reader.close()
    return texts


@pytest.mark.parametrize("ending", ENDINGS)
def test_samples_and_documents_are_those_of_the_shards(ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = train_bpe(["ab é🙂 some text to learn from"] * 10, 280, tmp_path_factory.mktemp("t") / "tokenizer.json")
    tokenizer = load_tokenizer(path)

    @given(shards, st.integers(1, 7))
    @settings(max_examples=40, deadline=None)
    def check(shards: list[list[Row]], group: int) -> None:
        with TemporaryDirectory() as folder:
            for i, rows in enumerate(shards):
                write(Path(folder) / f"{i}.{ending}", rows, ending, group)
            report = build_index(configured(Path(folder), dataplane={"tokenizer": str(path)}))
            everything = [row for rows in shards for row in rows]
            with open_index(Path(folder) / "index.h5") as index:
                texts = [row["text"] for row in everything]
                assert documents_of(index) == texts
                offsets = tokenizer.encode_batch(texts)[1]
                counts = np.diff(offsets).tolist()
                assert samples_of(index) == [described(row, n) for row, n in zip(everything, counts, strict=True)]
                check_tables(index)
                assert report.samples == index.tables.num_samples == len(everything)
                assert report.tokens == offsets[-1] == index.tables.histogram.tokens.sum()
                assert index.tables.shards.rows.tolist() == [len(rows) for rows in shards]

    check()


def described(row: Row, tokens: int) -> tuple[Any, ...]:
    language = row["meta"]["language"]
    return (() if language is None else (language,)), tuple(sorted(set(row["tags"]))), row["meta"]["quality"], tokens


def check_tables(index: PropertyIndex) -> None:
    """Check that dictionaries are sorted and fully used, and that all tables agree with the samples."""
    tables = index.tables
    for name, prop in tables.combos.properties.items():
        used = {v for c in range(tables.combos.num_combos) for v in tables.combos.values(name, c)}
        assert list(prop.values) == sorted(used)
    next_row = Counter[int]()
    for block in range(len(tables.blocks)):
        columns = index.read_block(block)
        cells = slice(*tables.histogram.indptr[block : block + 2])
        combos = np.unique(columns.combo)
        assert tables.histogram.combo[cells].tolist() == combos.tolist()
        assert tables.histogram.rows[cells].tolist() == [(columns.combo == c).sum() for c in combos]
        assert tables.histogram.tokens[cells].tolist() == [columns.tokens[columns.combo == c].sum() for c in combos]
        zones = tables.blocks.zones["quality"]
        quality = columns.numbers["quality"]
        low = np.fmin.reduce(quality)
        high = np.fmax.reduce(quality)
        assert np.array_equal([zones.low[block], zones.high[block]], [low, high], equal_nan=True)
        assert zones.has_null[block] == np.isnan(quality).any()
        shard = int(tables.blocks.shard[block])
        assert tables.blocks.first_row[block] == next_row[shard]
        next_row[shard] += int(tables.blocks.rows[block])


@given(shards, st.sampled_from(ENDINGS))
@settings(max_examples=40, deadline=None)
def test_building_again_writes_the_same_bytes(shards: list[list[Row]], ending: str) -> None:
    with TemporaryDirectory() as folder:
        for i, rows in enumerate(shards):
            write(Path(folder) / f"{i}.{ending}", rows, ending, 3)
        config = configured(Path(folder))
        index = Path(folder) / "index.h5"
        first = build_index(config)
        content = index.read_bytes()
        index.unlink()
        assert build_index(config).fingerprint == first.fingerprint
        assert index.read_bytes() == content
