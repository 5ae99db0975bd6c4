"""One corpus in every format: the same tokens reach the trainer."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc import DataPlane, compose
from mixtera_hpc.testing.small_collection import paragraphs
from mixtera_hpc.testing.writers import (
    PIXELS,
    write_arrow,
    write_compressed,
    write_jsonl,
    write_mds_rows,
    write_parquet,
    write_tar,
    write_text,
    write_tokens,
)
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_tokenizer

from .conftest import Cli

Rows = Sequence[dict[str, Any]]
MODULES = ("argparse", "tarfile", "statistics")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text for module in MODULES for text in paragraphs(module)]
    return train_bpe(texts, 512, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def write_as_tokens(folder: Path, rows: Rows, tokenizer: Path, append_eod: bool) -> list[Path]:
    loaded = load_tokenizer(tokenizer)
    end = [loaded.eos_id] if append_eod else []
    return write_tokens(folder, rows, lambda text: [*loaded.encode_batch([text])[0], *end])


STORED: dict[str, tuple[Callable[..., list[Path]], list[str]]] = {
    "jsonl": (write_jsonl, []),
    "gz": (partial(write_compressed, ending="gz"), []),
    "bz2": (partial(write_compressed, ending="bz2", frame_rows=20), []),
    "xz": (partial(write_compressed, ending="xz", frame_rows=30), []),
    "zst": (partial(write_compressed, ending="zst", frame_rows=10), []),
    "parquet": (partial(write_parquet, group_rows=33), []),
    "arrow": (partial(write_arrow, batch_rows=21), []),
    "webdataset": (write_tar, ["data.text=txt", "data.properties.source=json.meta.source"]),
    "mds": (write_mds_rows, []),
    "mds.zstd": (partial(write_mds_rows, compression="zstd"), []),
    "text": (write_text, ["data.include=['**/*.txt']", "data.properties.source=__parent__"]),
    "megatron": (write_as_tokens, []),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[..., list[str]]:
    """Return a function that writes the corpus in one format and returns the overrides that select it."""

    def write(kind: str, **more: Any) -> list[str]:
        folder = tmp_path_factory.mktemp(kind)
        writer, overrides = STORED[kind]
        for module in MODULES:
            (folder / "data" / module).mkdir(parents=True)
            rows = [{"text": text, "meta": {"source": module}, "tags": []} for text in paragraphs(module)]
            writer(folder / "data" / module, rows, **more)
        return [
            f"data.root={folder / 'data'}",
            "data.properties.source=meta.source",
            *overrides,
            f"index.path={folder / 'index.h5'}",
            "index.block_rows=16",
        ]

    return write


PLAN = [
    "mixture=natural",
    "mixture.group_by=[source]",
    "dataplane.shuffle=none",
    "dataplane.seq_len=64",
    "dataplane.global_batch_size=8",
    "plan.steps=40",
    "plan.digests=true",
]


def digests(call: Cli, words: list[str]) -> list[tuple[int, int, int, str]]:
    call("index", "build", *words)
    lines = call("plan", "--json", *words, *PLAN).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["position"], r["domain_id"], r["digest"]) for r in records]


@pytest.fixture(scope="module")
def expected(cli: Cli, stored: Callable[..., list[str]], tokenizer: Path) -> list[tuple[int, int, int, str]]:
    rows = digests(cli, [*stored("jsonl"), f"dataplane.tokenizer={tokenizer}"])
    assert len(rows) == 320
    assert len({digest for *_, digest in rows}) > 300
    return rows


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.full if kind in ("gz", "bz2", "xz", "mds.zstd") else [])
        for kind in STORED
        if kind not in ("jsonl", "megatron")
    ],
)
def test_every_format_gives_the_same_tokens(
    kind: str, verb: Cli, stored: Callable[..., list[str]], tokenizer: Path, expected: Any
) -> None:
    assert digests(verb, [*stored(kind), f"dataplane.tokenizer={tokenizer}"]) == expected


@pytest.mark.parametrize("append_eod", [True, False])
def test_stored_ids_give_the_same_tokens(
    append_eod: bool, verb: Cli, stored: Callable[..., list[str]], tokenizer: Path, expected: Any
) -> None:
    words = stored("megatron", tokenizer=tokenizer, append_eod=append_eod)
    assert digests(verb, [*words, f"dataplane.tokenizer={tokenizer}"]) == expected


def test_stored_ids_need_no_tokenizer(
    verb: Cli, stored: Callable[..., list[str]], tokenizer: Path, expected: Any
) -> None:
    known = load_tokenizer(tokenizer)
    words = stored("megatron", tokenizer=tokenizer, append_eod=True)
    vocabulary = [f"dataplane.vocab_size={known.vocab_size}", f"dataplane.eos_id={known.eos_id}"]
    assert digests(verb, [*words, *vocabulary]) == expected


def test_formats_mix_in_one_index(
    verb: Cli, stored: Callable[..., list[str]], tokenizer: Path, tmp_path: Path, expected: Any
) -> None:
    """Each module is in another format, with text and properties at the same paths."""
    writers = [
        write_arrow,
        partial(write_compressed, ending="zst"),
        partial(write_as_tokens, tokenizer=tokenizer, append_eod=True),
    ]
    for module, write in zip(MODULES, writers, strict=True):
        (tmp_path / "data" / module).mkdir(parents=True)
        rows = [{"text": text, "meta": {"source": module}, "tags": []} for text in paragraphs(module)]
        write(tmp_path / "data" / module, rows)
    words = [f"data.root={tmp_path / 'data'}", "data.properties.source=meta.source", f"index.path={tmp_path / 'i.h5'}"]
    assert digests(verb, [*words, f"dataplane.tokenizer={tokenizer}"]) == expected
    facts = json.loads(verb("index", "inspect", "--json", *words).stdout)
    assert facts["shards"] == 3


def test_images_of_a_tar_reach_the_trainer_as_bytes(verb: Cli, stored: Callable[..., list[str]]) -> None:
    words = [*stored("webdataset"), "mixture.unit=samples", "dataplane.global_batch_size=4"]
    verb("index", "build", *words)
    with DataPlane.open(compose(words)) as plane:
        batch = next(iter(plane))
    assert batch.payloads is not None and len(batch.payloads) == 4
    for payload in batch.payloads:
        assert payload["jpg"] == PIXELS and payload["json"]["meta"]["source"] in MODULES and payload["txt"]
