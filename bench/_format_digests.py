"""One corpus stored in every format, and what `plan --json plan.digests=true` says of each."""

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
NUM_ROWS, NUM_SEQUENCES = 1000, 320
PLAN = [
    "mixture=natural",
    "mixture.group_by=[source]",
    "dataplane.shuffle=none",
    "dataplane.seq_len=256",
    "dataplane.global_batch_size=8",
    f"plan.steps={NUM_SEQUENCES // 8}",
    "plan.digests=true",
]


def _tokens(folder: Path, rows: Rows) -> list[Path]:
    tokenizer = load_tokenizer(make_tokenizer())
    return write_tokens(folder, rows, lambda text: [*tokenizer.encode_batch([text])[0], tokenizer.eos_id])


STORED: dict[str, tuple[Callable[..., list[Path]], str]] = {
    "JSONL": (write_jsonl, SOURCE),
    "JSON": (write_json, SOURCE),
    "JSONL.gz": (partial(write_compressed, ending="gz"), SOURCE),
    "JSONL.zst": (partial(write_compressed, ending="zst", frame_rows=100), SOURCE),
    "JSONL.bz2": (partial(write_compressed, ending="bz2", frame_rows=100), SOURCE),
    "JSONL.xz": (partial(write_compressed, ending="xz", frame_rows=100), SOURCE),
    "Parquet": (partial(write_parquet, group_rows=97), SOURCE),
    "Arrow": (partial(write_arrow, batch_rows=97), SOURCE),
    "WebDataset": (write_tar, "data.properties.source=json.meta.redpajama_set_name"),
    "Megatron": (_tokens, "data.properties.source=__parent__"),
    "text": (write_text, "data.properties.source=__parent__"),
}

MORE = {"JSON": ["data.include=['**/*.json']"], "text": ["data.include=['**/*.txt']"], "WebDataset": ["data.text=txt"]}


def digests() -> dict[str, str]:
    """Format → digest of the digests of the first sequences, in served order. Each source is a folder with one shard."""
    lines = min(make_rows(NUM_ROWS).glob("*.jsonl")).read_bytes()
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in msgspec.json.Decoder().decode_lines(lines):
        by_source.setdefault(row["meta"]["redpajama_set_name"], []).append({"tags": [], **row})
    return {stored: _digest(stored, by_source) for stored in STORED}


def _digest(stored: str, by_source: dict[str, list[dict[str, Any]]]) -> str:
    write, source = STORED[stored]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in by_source.items():
            (Path(folder) / "data" / name).mkdir(parents=True)
            write(Path(folder) / "data" / name, rows)
        words = [f"data.root={folder}/data", f"index.path={folder}/index.h5", source]
        words += [f"dataplane.tokenizer={make_tokenizer()}"]
        words += MORE.get(stored, [])
        _run("index", "build", *words)
        found = [json.loads(line)["digest"] for line in _run("plan", "--json", *words, *PLAN).splitlines()]
    assert len(found) == NUM_SEQUENCES
    return hashlib.blake2b(" ".join(found).encode(), digest_size=8).hexdigest()


def _run(*words: str) -> str:
    command = [sys.executable, "-m", "mixtera_hpc", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
