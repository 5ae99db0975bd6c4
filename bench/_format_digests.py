"""Digests of the sequences that a run serves from one corpus stored in every format; they must all be equal."""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench._corpus import make_rows, make_tokenizer
from mixtera_hpc.testing.writers import (
    write_arrow,
    write_compressed,
    write_json,
    write_jsonl,
    write_parquet,
    write_tar,
    write_text,
    write_tokens,
)
from mixtera_hpc.tokens.tokenizer import load_tokenizer

Rows = Sequence[dict[str, Any]]
SOURCE = "data.properties.source=meta.redpajama_set_name"
"""Override that selects the source of a row as a property."""

NUM_ROWS = 1000
NUM_SEQUENCES = 320
"""Number of sequences that are compared."""

GLOBAL_BATCH_SIZE = 8
PLAN = [
    "mixture=natural",
    "mixture.group_by=[source]",
    "dataplane.shuffle=none",
    "dataplane.seq_len=256",
    f"dataplane.global_batch_size={GLOBAL_BATCH_SIZE}",
    f"plan.steps={NUM_SEQUENCES // GLOBAL_BATCH_SIZE}",
    "plan.digests=true",
]


def _write_tokens(folder: Path, rows: Rows) -> list[Path]:
    tokenizer = load_tokenizer(make_tokenizer())
    return write_tokens(folder, rows, lambda text: [*tokenizer.encode_batch([text])[0], tokenizer.eos_id])


FORMATS: dict[str, tuple[Callable[..., list[Path]], str]] = {
    "JSONL": (write_jsonl, SOURCE),
    "JSON": (write_json, SOURCE),
    "JSONL.gz": (partial(write_compressed, ending="gz"), SOURCE),
    "JSONL.zst": (partial(write_compressed, ending="zst", frame_rows=100), SOURCE),
    "JSONL.bz2": (partial(write_compressed, ending="bz2", frame_rows=100), SOURCE),
    "JSONL.xz": (partial(write_compressed, ending="xz", frame_rows=100), SOURCE),
    "Parquet": (partial(write_parquet, group_rows=97), SOURCE),
    "Arrow": (partial(write_arrow, batch_rows=97), SOURCE),
    "WebDataset": (write_tar, "data.properties.source=json.meta.redpajama_set_name"),
    "Megatron": (_write_tokens, "data.properties.source=__parent__"),
    "text": (write_text, "data.properties.source=__parent__"),
}
"""Format → the function that writes rows in it, and the override that selects the source of a row."""

EXTRA_OVERRIDES = {
    "JSON": ["data.include=['**/*.json']"],
    "text": ["data.include=['**/*.txt']"],
    "WebDataset": ["data.text=txt"],
}


def digests() -> dict[str, str]:
    """Return for every format one digest over the first sequences in served order.

    Each source is stored in a separate folder, with one shard.
    """
    lines = min(make_rows(NUM_ROWS).glob("*.jsonl")).read_bytes()
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in msgspec.json.Decoder().decode_lines(lines):
        by_source.setdefault(row["meta"]["redpajama_set_name"], []).append({"tags": [], **row})
    return {name: _digest(name, by_source) for name in FORMATS}


def _digest(format_name: str, rows_by_source: dict[str, list[dict[str, Any]]]) -> str:
    write, source_override = FORMATS[format_name]
    with tempfile.TemporaryDirectory() as folder:
        for source, rows in rows_by_source.items():
            source_folder = Path(folder) / "data" / source
            source_folder.mkdir(parents=True)
            write(source_folder, rows)
        overrides = [
            f"data.root={folder}/data",
            f"index.path={folder}/index.h5",
            source_override,
            f"dataplane.tokenizer={make_tokenizer()}",
            *EXTRA_OVERRIDES.get(format_name, []),
        ]
        _run("index", "build", *overrides)
        lines = _run("plan", "--json", *overrides, *PLAN).splitlines()
    sequence_digests = [json.loads(line)["digest"] for line in lines]
    assert len(sequence_digests) == NUM_SEQUENCES
    return hashlib.blake2b(" ".join(sequence_digests).encode(), digest_size=8).hexdigest()


def _run(*arguments: str) -> str:
    """Run `mixtera-hpc` in a separate process and return its output."""
    command = [sys.executable, "-m", "mixtera_hpc", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
