"""Bytes changed anywhere in a shard of any format give a `UserError` that names the file, or other rows."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import UserError
from mixtera_hpc.formats.base import PropertyField, ScanSpec, Vocabulary
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.testing.format_cases import read_blocks, sample_rows, scan_whole_shard
from mixtera_hpc.testing.work_limit import limited_time
from mixtera_hpc.testing.writers import (
    write_arrow,
    write_arrow_stream,
    write_compressed,
    write_json,
    write_jsonl,
    write_mds_rows,
    write_parquet,
    write_tar,
    write_tokens,
)

ROWS = sample_rows(60)
FORMATS = {
    "jsonl": ("jsonl", write_jsonl, "text", ""),
    "json": ("json", write_json, "text", ""),
    **{
        e: (f"jsonl.{e}", partial(write_compressed, ending=e, frame_rows=20), "text", "")
        for e in ("gz", "bz2", "xz", "zst")
    },
    "parquet": ("parquet", partial(write_parquet, group_rows=20), "text", ""),
    "arrow": ("arrow", partial(write_arrow, batch_rows=20), "text", ""),
    "arrow stream": ("arrow", partial(write_arrow_stream, batch_rows=20), "text", ""),
    "webdataset": ("webdataset", write_tar, "txt", "json."),
    "mds": ("mds", write_mds_rows, "text", ""),
    "mds, compressed": ("mds", partial(write_mds_rows, compression="zstd"), "text", ""),
    "megatron": ("megatron", write_tokens, None, ""),
    "megatron idx": ("megatron", write_tokens, None, ""),
}


def spec_of(text: str | None, below: str) -> ScanSpec:
    return ScanSpec(
        text=text,
        properties=(
            PropertyField(name="language", path=f"{below}meta.language", kind=Kind.CATEGORY),
            PropertyField(name="quality", path=f"{below}meta.quality", kind=Kind.NUMBER),
            PropertyField(name="tags", path=f"{below}tags", kind=Kind.CATEGORIES),
        ),
        documents=True,
        vocabulary=Vocabulary(size=256, eos_id=0),
    )


def scan_and_read(name: str, shard: Path, spec: ScanSpec) -> None:
    """Scan a shard and read all of it, as a build and a run do."""
    fmt = load_format(name)
    blocks = read_blocks(scan_whole_shard(fmt, shard, spec))
    reader: Any = fmt.open(shard, spec.text, BlockCache())
    for block, lengths in blocks:
        if fmt.holds_tokens:
            reader.tokens(block, np.arange(block.rows))
        else:
            reader.documents(block, lengths, np.arange(block.rows))
        reader.payloads(block, lengths, np.arange(block.rows))
    reader.close()


TIME_LIMIT_SECONDS = 120
"""Far more than a busy machine needs: the shards are small."""
# Headers and footers, where sizes and counts are, get most of the changes.
PLACES = st.floats(0, 1) | st.floats(0, 0.03) | st.floats(0.85, 1)


def varint(value: int) -> bytes:
    """Encode a number of at most 64 bits as Thrift does, in its longest form."""
    return bytes(value >> shift & 0x7F | 0x80 for shift in range(0, 63, 7)) + bytes([value >> 63])


NUMBERS = [0, 1, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1]
CONTENTS = st.binary(min_size=1, max_size=40) | st.sampled_from(
    [
        *(number.to_bytes(8, "little") for number in NUMBERS),
        *((-number).to_bytes(8, "little", signed=True) for number in NUMBERS),
        *(number.to_bytes(4, "little") for number in NUMBERS if number < 1 << 32),
        *(number.to_bytes(8, "big") for number in NUMBERS),
        *map(varint, NUMBERS),
        # A list, in the protocol of Thrift, of many booleans, doubles, numbers, texts or structs.
        *(bytes([0x19, 0xF0 | kind]) + varint(1 << 60) for kind in (1, 7, 6, 8, 12)),
    ]
)


class Files(dict[str, bytes]):
    """File name → content. The content is left out of failure messages."""

    def __repr__(self) -> str:
        return f"Files({', '.join(self)})"


@pytest.fixture(scope="module")
def shards() -> dict[str, Files]:
    """Return the files of every format."""
    files = {}
    for kind, (_, write, _, _) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), ROWS)
            files[kind] = Files({path.name: path.read_bytes() for path in Path(folder).iterdir()})
    return files


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=PLACES, new=CONTENTS, grow=st.booleans())
@example(place=1.0, new=b"\0", grow=True)
@example(place=0.0, new=b"\xff" * 8, grow=False)
def test_changed_bytes_never_crash(kind: str, place: float, new: bytes, grow: bool, shards: dict[str, Files]) -> None:
    name, _, text, below = FORMATS[kind]
    with tempfile.TemporaryDirectory() as folder:
        for file, data in shards[kind].items():
            (Path(folder) / file).write_bytes(data)
        shard = next(
            Path(folder) / file for file in shards[kind] if not file.endswith((".idx", ".sidecar.jsonl", "index.json"))
        )
        target = shard.with_suffix(".idx") if kind == "megatron idx" else shard
        data = target.read_bytes()
        position = int(place * len(data))
        replaced = 0 if grow else len(new)
        target.write_bytes(data[:position] + new + data[position + replaced :])
        try:
            with limited_time(TIME_LIMIT_SECONDS):
                scan_and_read(name, shard, spec_of(text, below))
        except UserError as error:
            assert "shard" in f"{error} {getattr(error, '__notes__', '')}", "the file is named"
